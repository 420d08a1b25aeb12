"""Published methods, one short file each. Importing this package fills the registry."""

from cache4diffusion.methods.ab_cache import ABCache
from cache4diffusion.methods.adacache import AdaCache
from cache4diffusion.methods.asymrnr import AsymRnR
from cache4diffusion.methods.at_edm import ATEDM
from cache4diffusion.methods.bacache import BACache
from cache4diffusion.methods.block_caching import BlockCaching
from cache4diffusion.methods.bwcache import BWCache
from cache4diffusion.methods.ca2_vdm import Ca2VDM
from cache4diffusion.methods.ca_tome import CAToMe
from cache4diffusion.methods.cachequant import CacheQuant
from cache4diffusion.methods.clusca import ClusCa
from cache4diffusion.methods.dato import DaTo
from cache4diffusion.methods.dbcache import DBCache
from cache4diffusion.methods.dbprune import DBPrune
from cache4diffusion.methods.deepcache import DeepCache
from cache4diffusion.methods.delta_dit import DeltaDiT
from cache4diffusion.methods.dicache import DiCache
from cache4diffusion.methods.dmd import DMD
from cache4diffusion.methods.dpcache import DPCache
from cache4diffusion.methods.duca import DuCa
from cache4diffusion.methods.easycache import EasyCache
from cache4diffusion.methods.fastcache import FastCache
from cache4diffusion.methods.faster_diffusion import FasterDiffusion
from cache4diffusion.methods.fastercache import FasterCache
from cache4diffusion.methods.fbcache import FBCache
from cache4diffusion.methods.feb_cache import FEBCache
from cache4diffusion.methods.femo import FeMO
from cache4diffusion.methods.foca import FoCa
from cache4diffusion.methods.fora import Fora
from cache4diffusion.methods.frdiff import FRDiff
from cache4diffusion.methods.freqca import FreqCa
from cache4diffusion.methods.goc import GOC
from cache4diffusion.methods.harmonica import HarmoniCa
from cache4diffusion.methods.hicache import HiCache
from cache4diffusion.methods.icc import ICC
from cache4diffusion.methods.importance_merging import ImportanceMerging
from cache4diffusion.methods.l2c import L2C
from cache4diffusion.methods.l2p import L2P
from cache4diffusion.methods.lazydit import LazyDiT
from cache4diffusion.methods.lemica import LeMiCa
from cache4diffusion.methods.magcache import MagCache
from cache4diffusion.methods.md_dit import MDDiT
from cache4diffusion.methods.meancache import MeanCache
from cache4diffusion.methods.newton import Newton
from cache4diffusion.methods.pab import PAB
from cache4diffusion.methods.quantcache import QuantCache
from cache4diffusion.methods.scm import SCM
from cache4diffusion.methods.seacache import SeaCache
from cache4diffusion.methods.skip_dit import SkipDiT
from cache4diffusion.methods.smoothcache import SmoothCache
from cache4diffusion.methods.speca import SpeCa
from cache4diffusion.methods.spectrum import Spectrum
from cache4diffusion.methods.t_gate_v1 import TGateV1
from cache4diffusion.methods.t_gate_v2 import TGateV2
from cache4diffusion.methods.taocache import TaoCache
from cache4diffusion.methods.taylorseer import TaylorSeer
from cache4diffusion.methods.taylorseer_lite import TaylorSeerLite
from cache4diffusion.methods.teacache import TeaCache
from cache4diffusion.methods.text_kv_cache import TextKVCache
from cache4diffusion.methods.toca import ToCa
from cache4diffusion.methods.todo import ToDo
from cache4diffusion.methods.tofu import ToFu
from cache4diffusion.methods.tokencache import TokenCache
from cache4diffusion.methods.toma import ToMA
from cache4diffusion.methods.tome import ToMe
from cache4diffusion.methods.vcut import VCUT
from cache4diffusion.methods.waveex import WaveEx
from cache4diffusion.methods.z_cache import ZCache

__all__ = [
    "ATEDM",
    "DMD",
    "GOC",
    "ICC",
    "L2C",
    "L2P",
    "PAB",
    "SCM",
    "VCUT",
    "ABCache",
    "AdaCache",
    "AsymRnR",
    "BACache",
    "BWCache",
    "BlockCaching",
    "CAToMe",
    "Ca2VDM",
    "CacheQuant",
    "ClusCa",
    "DBCache",
    "DBPrune",
    "DPCache",
    "DaTo",
    "DeepCache",
    "DeltaDiT",
    "DiCache",
    "DuCa",
    "EasyCache",
    "FBCache",
    "FEBCache",
    "FRDiff",
    "FastCache",
    "FasterCache",
    "FasterDiffusion",
    "FeMO",
    "FoCa",
    "Fora",
    "FreqCa",
    "HarmoniCa",
    "HiCache",
    "ImportanceMerging",
    "LazyDiT",
    "LeMiCa",
    "MDDiT",
    "MagCache",
    "MeanCache",
    "Newton",
    "QuantCache",
    "SeaCache",
    "SkipDiT",
    "SmoothCache",
    "SpeCa",
    "Spectrum",
    "TGateV1",
    "TGateV2",
    "TaoCache",
    "TaylorSeer",
    "TaylorSeerLite",
    "TeaCache",
    "TextKVCache",
    "ToCa",
    "ToDo",
    "ToFu",
    "ToMA",
    "ToMe",
    "TokenCache",
    "WaveEx",
    "ZCache",
]
