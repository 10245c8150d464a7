"""Run the exactness tests as on other processors: `python -m tests.processors`, or `make test-processors`.

Float32 results differ between processors in the last bits, since their instruction sets add in other orders. torch,
oneDNN and MKL can be told to use less than a machine has, so one machine stands for several. Arguments go to pytest.
"""

import os
import subprocess
import sys

import torch

# By torch's name of a capability: what the three libraries are told.
PROCESSORS = {
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def main() -> int:
    """Run pytest once for each capability that this machine has; the status of the worst run."""
    own = torch.backends.cpu.get_cpu_capability()
    if own not in PROCESSORS:
        sys.exit(f"no instruction sets are known to be chosen from on this processor, whose capability is {own}")
    names = list(PROCESSORS)
    worst = 0
    for name in names[: names.index(own) + 1]:
        print(f"\n== {' '.join(f'{key}={value}' for key, value in PROCESSORS[name].items())}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "exactness and not launches and not weights"]
        worst = max(worst, subprocess.run([*command, *sys.argv[1:]], env=os.environ | PROCESSORS[name]).returncode)
    for name in names[names.index(own) + 1 :]:
        print(f"\n== {name}: this machine has no such instructions")
    return worst


if __name__ == "__main__":
    sys.exit(main())
