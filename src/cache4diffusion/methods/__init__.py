"""Published methods, one short file each. Importing this package fills the registry."""

from cache4diffusion.methods.ab_cache import ABCache
from cache4diffusion.methods.dbcache import DBCache
from cache4diffusion.methods.deepcache import DeepCache
from cache4diffusion.methods.dmd import DMD
from cache4diffusion.methods.fastercache import FasterCache
from cache4diffusion.methods.fbcache import FBCache
from cache4diffusion.methods.femo import FeMO
from cache4diffusion.methods.foca import FoCa
from cache4diffusion.methods.fora import Fora
from cache4diffusion.methods.freqca import FreqCa
from cache4diffusion.methods.goc import GOC
from cache4diffusion.methods.hicache import HiCache
from cache4diffusion.methods.meancache import MeanCache
from cache4diffusion.methods.newton import Newton
from cache4diffusion.methods.speca import SpeCa
from cache4diffusion.methods.spectrum import Spectrum
from cache4diffusion.methods.taocache import TaoCache
from cache4diffusion.methods.taylorseer import TaylorSeer
from cache4diffusion.methods.taylorseer_lite import TaylorSeerLite
from cache4diffusion.methods.teacache import TeaCache
from cache4diffusion.methods.toca import ToCa
from cache4diffusion.methods.waveex import WaveEx
from cache4diffusion.methods.z_cache import ZCache

__all__ = [
    "DMD",
    "GOC",
    "ABCache",
    "DBCache",
    "DeepCache",
    "FBCache",
    "FasterCache",
    "FeMO",
    "FoCa",
    "Fora",
    "FreqCa",
    "HiCache",
    "MeanCache",
    "Newton",
    "SpeCa",
    "Spectrum",
    "TaoCache",
    "TaylorSeer",
    "TaylorSeerLite",
    "TeaCache",
    "ToCa",
    "WaveEx",
    "ZCache",
]
