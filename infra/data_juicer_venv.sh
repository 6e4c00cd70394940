#!/bin/sh
# Make the venv that `make bench` compares with: Data-Juicer 1.6.1 with what its size, shape and duplicate operators import.
# Usage: infra/data_juicer_venv.sh [FOLDER]; then DATA_JUICER_PYTHON=FOLDER/bin/python make bench
#
# Data-Juicer takes its perceptual hash from imagededup, which imports torchvision for its neural networks. Those are not used here, and
# PyPI's torchvision does not load beside a CPU build of torch: a package of empty modules stands in for it, whose names can be imported
# and do nothing. The hash itself is imagededup's own (Pillow, numpy, scipy) and runs as it is.
set -eu
folder=${1:-/tmp/data_juicer_venv}
python3.11 -m venv "$folder"
python=$folder/bin/python
"$python" -m pip install --quiet torch==2.13.0 uv
# uv resolves Data-Juicer's hundred packages in 2 CPU-s, where pip takes minutes; it keeps the torch that is there.
"$folder/bin/uv" pip install --quiet --python "$python" ${PIP_INDEX_URL:+--default-index "$PIP_INDEX_URL"} \
    py-data-juicer==1.6.1 aiohttp ray scikit-learn PyWavelets matplotlib
"$python" -m pip install --quiet --no-deps imagededup==0.3.3.post2

if ! "$python" -c 'import torchvision' 2>/dev/null; then
    stub=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision
    mkdir -p "$stub/models/vision_transformer" "$stub/transforms"
    cat > "$stub/__init__.py" <<'PYTHON'
"""Stands in for torchvision, of which imagededup's hashes need nothing: every name of these modules is a Placeholder."""


class Placeholder:
    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self
PYTHON
    for module in models models/vision_transformer transforms; do
        cat > "$stub/$module/__init__.py" <<'PYTHON'
from torchvision import Placeholder


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Placeholder()
PYTHON
    done
fi
"$python" -c 'from imagededup.methods import PHash; import data_juicer; print("ready:", data_juicer.__version__, PHash.__name__)'
