"""Too little memory for the buffers of the compiled kernels is an error that names the size, and the process goes on."""

import re
import subprocess
import sys

import pytest

from fastff.kernels import native

SCRIPT = """
import resource, torch
import fastff.functional as ff
x, weight, target = torch.zeros(2, 8, 1024, 1024), torch.zeros(4, 8), torch.zeros(2, dtype=torch.int64)
step = lambda x: ff.goodness_step(x, weight, None, target, need_grad_x=False, normalize=None, impl="native", algorithm="direct")
step(x[:, :, :4, :4])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), limit[1]))
try:
    step(x)
except RuntimeError as error:
    resource.setrlimit(resource.RLIMIT_AS, limit)
    print(error)
print(float(step(x).loss))
"""


@pytest.mark.skipif(sys.platform != "linux" or native.reason() != "", reason="limits the memory of a Linux process")
def test_says_so():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (message, _) = done.stdout.splitlines()
    assert re.search(r"not enough memory: the compiled library could not allocate \d+ bytes", message), message
    assert int(message.split()[-2]) > 20 << 20, message
