"""A second, naive implementation of the decoding methods, to test the package against.

Written from the methods' description with dictionaries, lists and loops, one branch and one position at a
time; it imports nothing of the package. `decode` runs a whole request, `policy` holds one function per
phase on a plain state, `ScriptedModel` is a fake model that makes every event of the algorithm frequent.
"""

from oracle import policy
from oracle.config import OracleConfig
from oracle.decoders import OracleResult, decode
from oracle.scripted import ScriptedModel

__all__ = ["OracleConfig", "OracleResult", "ScriptedModel", "decode", "policy"]
