"""timm without torch's compiler: nothing slow is imported, and nothing is missing afterwards."""

import subprocess
import sys

PROGRAM = """
import sys
import robust_submission.api, robust_submission.prediction.writer
slow = "torch._dynamo sympy scipy.stats pandas matplotlib albumentations datasets".split()
assert not (found := set(slow) & sys.modules.keys()), found
import timm, torch
from timm.layers import create_feature_extractor
from torchvision.ops import roi_align
pooled = roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), 2)
assert pooled.shape == (1, 1, 2, 2) and pooled.eq(1).all()
doubled = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2))
assert doubled.eq(2).all() and "torch._dynamo" in sys.modules
import torchvision.ops.roi_align
from torch._dynamo.utils import is_compile_supported
standing_in = sys.modules["torchvision.ops.roi_align"].is_compile_supported
assert standing_in("cpu") == is_compile_supported("cpu")
assert torch.compiler.disable.__module__ == "torch.compiler"
print("done")
"""


def test_the_compiler_is_imported_only_when_it_is_used():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
