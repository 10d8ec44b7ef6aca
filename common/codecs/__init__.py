"""Codecs: fp32 values to bytes and back, by name, for pushes and for pulls.

    registry.py  names, arguments, codecs of users       plain.py  none, fp16, bf16
    int8.py      1 byte per value, a scale per block     sign.py   1 bit per value, a scale per block
    topk.py      the largest values and their indices    randk.py  values at pseudo-random positions
    on_gpu.py    the codecs that run on a GPU            pulled_copies.py  error feedback for pulls

Rules of this folder
  1. ``registry`` is the only list of codecs; options, servers and workers read it.
  2. A codec holds no state; the caller keeps what a lossy codec leaves out.
  3. ``check`` refuses bad bytes of a peer before anything uses them; ``decode`` of checked bytes cannot fail.
  4. Looking up a name does not load torch; the codecs are loaded at first use.
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
