"""The two compiled modules.  Everything else is in pyproject.toml."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

FASTPATH = Extension(
    "udptun._fastpath",
    sources=["udptun/_fastpath.pyx"],
    include_dirs=["udptun/fastpath/csrc"],
    depends=[str(path) for pattern in ("*.pxd", "csrc/*.h") for path in Path("udptun/fastpath").glob(pattern)],
    # Python's own CFLAGS carry -O2 or -O3 and -g; the last flag wins.
    extra_compile_args=["-O3", "-g1", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

setup(
    ext_modules=cythonize(
        [FASTPATH],
        build_dir="build/cython",
        language_level="3str",
    ),
    cffi_modules=["udptun/_kabi_build.py:ffi"],
)
