"""An OpenAI-compatible server. Nothing outside of this package and launch/serve.py imports it (extra `serve`)."""
