"""jaxchat: from raw text to a chat model you can talk to, in JAX."""
