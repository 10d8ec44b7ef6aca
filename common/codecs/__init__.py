"""Codecs: fp32 values to bytes and back, by name, for pushes and for pulls.

    table.py   names, arguments, the user's own codecs           plain.py   none, fp16, bf16
    int8.py    one byte a value, a scale per block               sign.py    one bit a value, a scale per block
    topk.py    the largest values and where they are             randk.py   values at places that a seed gives
    device.py  which of them a GPU runs by itself

Rules of this folder
  1. ``table`` is the only list of codecs; options, the servers and the workers all read it.
  2. A codec holds no state; what a lossy one leaves out is the caller's to keep.
  3. Bytes from a peer are checked by ``check`` before anything is done with them; ``decode`` then cannot fail.
  4. To look up a name loads no torch; the codecs themselves are loaded at first use.

Source: see the module of each codec.
"""

from torch_ps.common.codecs.registry import (
    Codec,
    check_argument,
    check_name,
    codec,
    forms,
    load,
    make_codec,
    names,
    register_codec,
)

__all__ = ["Codec", "check_argument", "check_name", "codec", "forms", "load", "make_codec", "names", "register_codec"]
