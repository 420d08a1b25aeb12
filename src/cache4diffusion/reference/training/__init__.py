"""Training of the reference models: python -m cache4diffusion.reference.training.vae, then .flow."""
