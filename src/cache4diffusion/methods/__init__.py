"""Published methods, one short file each. Importing this package fills the registry."""

from cache4diffusion.methods.dbcache import DBCache
from cache4diffusion.methods.deepcache import DeepCache
from cache4diffusion.methods.fastercache import FasterCache
from cache4diffusion.methods.fbcache import FBCache
from cache4diffusion.methods.fora import Fora
from cache4diffusion.methods.speca import SpeCa
from cache4diffusion.methods.taylorseer import TaylorSeer
from cache4diffusion.methods.taylorseer_lite import TaylorSeerLite
from cache4diffusion.methods.teacache import TeaCache
from cache4diffusion.methods.toca import ToCa

__all__ = [
    "DBCache",
    "DeepCache",
    "FBCache",
    "FasterCache",
    "Fora",
    "SpeCa",
    "TaylorSeer",
    "TaylorSeerLite",
    "TeaCache",
    "ToCa",
]
