"""Stock pipelines of diffusers with tiny random components, and what must hold in each of them."""
