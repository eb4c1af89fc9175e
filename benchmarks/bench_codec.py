"""What turning values into messages and back costs."""

from __future__ import annotations

from harness import Case, System, main

CASES = [
    Case("gradients_encode", "encode a gradient message (4 float32[8])"),
    Case("gradients_decode", "decode a gradient message (4 float32[8])"),
    Case("arguments_encode", "encode the arguments of a call"),
    Case("arguments_decode", "decode the arguments of a call"),
]
SYSTEMS = [
    System("distgrad", ["codec_distgrad.py"]),
    System("pickle 5", ["codec_pickle.py"], control=True),
    System("msgspec", ["codec_msgspec.py"]),
]

if __name__ == "__main__":
    main("codec", __doc__, CASES, SYSTEMS)
