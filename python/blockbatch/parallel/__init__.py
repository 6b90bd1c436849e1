"""One model on several GPUs of a host: tensor parallelism, as docs/tensor_parallel.md has it."""

from blockbatch.parallel.digest import HostDigest
from blockbatch.parallel.group import RankGroup
from blockbatch.parallel.plans import Plans
from blockbatch.parallel.shards import Shard
from blockbatch.parallel.share import WHOLE, RankShare, Share, share_of
from blockbatch.parallel.watch import RankError

__all__ = [
    "WHOLE",
    "HostDigest",
    "Plans",
    "RankError",
    "RankGroup",
    "RankShare",
    "Shard",
    "Share",
    "share_of",
]
