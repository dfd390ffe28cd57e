# shellcheck shell=sh
# SPDX-License-Identifier: Apache-2.0
#
# To be sourced: where `layershard bench step` finds cuBLAS and NCCL when the loader does not know them, because they
# came with PyTorch. Sets LAYERSHARD_CUBLAS_SO_PATH and LAYERSHARD_NCCL_SO_PATH unless they are set; python3's packages
# are looked through, nothing is imported but the package `nvidia`.

gpu_library() { # gpu_library PATTERN: the first file of python3's nvidia packages that is so called
	python3 -c '
import glob, sys
try:
    import nvidia
except ImportError:
    sys.exit()
found = sorted(file for path in nvidia.__path__ for file in glob.glob(path + "/*/lib/" + sys.argv[1]))
print(found[-1] if found else "")' "$1" 2>/dev/null || true
}

found=${LAYERSHARD_CUBLAS_SO_PATH:-$(gpu_library 'libcublas.so.1[23]')}
[ -z "$found" ] || export LAYERSHARD_CUBLAS_SO_PATH="$found"
found=${LAYERSHARD_NCCL_SO_PATH:-$(gpu_library 'libnccl.so.2')}
[ -z "$found" ] || export LAYERSHARD_NCCL_SO_PATH="$found"
