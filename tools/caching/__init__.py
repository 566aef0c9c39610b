"""Parts of tools/cache_latents.py."""
