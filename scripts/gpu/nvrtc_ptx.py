"""Compiles one CUDA source to PTX with a given libnvrtc.

Usage: nvrtc_ptx.py LIBRARY SOURCE OUT OPTION...
What the compiler says goes to stderr; a warning fails too. Needs nothing but Python's standard library.
"""

import ctypes
import os
import sys


def main(library, source, out, *options):
    nvrtc = ctypes.CDLL(library)
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(name, *args):
        code = getattr(nvrtc, name)(*args)
        return "" if code == 0 else f"{name}: {nvrtc.nvrtcGetErrorString(code).decode()}"

    def must(name, *args):
        error = call(name, *args)
        if error:
            sys.exit(f"nvrtc_ptx: {error}")

    def text_of(size, get):
        bytes_ = ctypes.c_size_t()
        must(size, program, ctypes.byref(bytes_))
        buffer = ctypes.create_string_buffer(bytes_.value)
        must(get, program, buffer)
        return buffer.value

    with open(source, "rb") as file:
        text = file.read()
    program = ctypes.c_void_p()
    # The name is in messages only; without its folder, so that nothing depends on where this runs.
    name = os.path.basename(source).encode()
    must("nvrtcCreateProgram", ctypes.byref(program), text, name, 0, None, None)
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    error = call("nvrtcCompileProgram", program, len(options), array)
    log = text_of("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode().strip()
    if log:
        print(log, file=sys.stderr)
    if error or log:
        sys.exit(f"nvrtc_ptx: {error or 'the compiler warns'}")
    with open(out, "wb") as file:
        file.write(text_of("nvrtcGetPTXSize", "nvrtcGetPTX"))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: nvrtc_ptx.py LIBRARY SOURCE OUT OPTION...")
    main(*sys.argv[1:])
