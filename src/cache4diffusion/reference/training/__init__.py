"""Training of the reference models: ``.vae``, then ``.flow``; ``.restore`` goes on from a built folder."""
