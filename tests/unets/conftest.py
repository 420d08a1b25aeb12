from unet_fixtures import one_thread, seen_once

__all__ = ["one_thread", "seen_once"]
