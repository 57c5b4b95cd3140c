// Runs before the page is painted: applies the colour scheme that was chosen; without one, the system's.
document.documentElement.dataset.theme = localStorage.getItem("jaxchat.theme") ?? "";
