#!/bin/sh
# Builds decode.cpp against the torch of $PYTHON (python3):  examples/cpp/build.sh OUTPUT
set -e
torch=$("${PYTHON:-python3}" -c 'import torch; print(torch.__path__[0])')
${CXX:-c++} -std=c++20 -O1 -o "$1" "$(dirname "$0")/decode.cpp" \
    -I"$torch/include" -I"$torch/include/torch/csrc/api/include" \
    -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
