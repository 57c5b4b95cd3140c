// Before anything is drawn: the scheme that was chosen; without one the system's holds.
document.documentElement.dataset.theme = localStorage.getItem("jaxchat.theme") ?? "";
