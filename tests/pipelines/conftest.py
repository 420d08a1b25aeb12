from unet_fixtures import seen_once

__all__ = ["seen_once"]
