"""A network as one program, with a batch of any size: ONNX, checked against ours, and torch.export."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from acn_scale.config import BertConfig, ModelConfig
from acn_scale.convert.export import CONFIG_NAME
from acn_scale.convert.network import DTYPES, Network
from acn_scale.errors import UserError
from acn_scale.runs import write_json

TOLERANCE = 1e-5  # of a logit, between ONNX Runtime and ours in fp32
BATCHES = (1, 3)  # checked, one other than the program was made with


class Program(nn.Module):
    """Inputs by position -> logits; a masked language model's at every position, with all segments 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, channels, height, width) -> (batch, classes)."""
        return self.model(images)["logits"]


class LanguageProgram(Program):
    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask: (batch, tokens), mask False at padding -> (batch, tokens, vocab_size)."""
        return self.model(tokens, mask=mask)["logits"]


class SentenceProgram(Program):
    def forward(self, tokens: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
        """tokens, mask, segments: (batch, tokens), segments 1 in the second text of a pair -> (batch, classes)."""
        return self.model(tokens, segments=segments, mask=mask)["logits"]


def write_program(net: Network, folder: Path, dtype: str) -> None:
    """model.pt2, for torch.export.load."""
    program, inputs = _program(net, dtype), _inputs(net.card.model, 2, dtype)
    torch.export.save(_exported(program, inputs), folder / "model.pt2")
    _describe(net, folder, dtype, inputs)


def write_onnx(net: Network, folder: Path, dtype: str) -> None:
    """model.onnx. Raises UserError where what it takes is not installed, or ONNX Runtime computes something else."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--to onnx: {error.name} is missing: pip install onnx onnxscript onnxruntime") from None
    if dtype == "bf16":
        raise UserError("--dtype bf16: ONNX Runtime has no bf16 on CPUs; --to onnx takes fp32 or fp16")
    program, inputs = _program(net, dtype), _inputs(net.card.model, 2, dtype)
    path = folder / "model.onnx"
    torch.onnx.export(
        _exported(program, inputs),
        f=path,
        input_names=list(inputs),
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in BATCHES:
        inputs = _inputs(net.card.model, batch, dtype)
        with torch.no_grad():
            expected = program(*inputs.values()).float().numpy()
        (got,) = session.run(["logits"], {name: values.numpy() for name, values in inputs.items()})
        worst = np.abs(got.astype(np.float32) - expected).max()
        if not worst <= TOLERANCE * (1 if dtype == "fp32" else 1000):
            raise UserError(f"--to onnx: ONNX Runtime's logits differ from ours by {worst:.1e}")
    _describe(net, folder, dtype, inputs)


def _program(net: Network, dtype: str) -> Program:
    model, cfg = net.model.to(DTYPES[dtype]), net.card.model
    if not isinstance(cfg, BertConfig):
        return Program(model)
    return SentenceProgram(model) if cfg.num_classes else LanguageProgram(model)


def _inputs(model: ModelConfig, batch: int, dtype: str) -> dict[str, Tensor]:
    """Random ones."""
    generator = torch.Generator().manual_seed(batch)
    if isinstance(model, BertConfig):
        tokens = torch.randint(model.vocab_size, (batch, model.max_tokens), generator=generator)
        lengths = torch.randint(1, model.max_tokens + 1, (batch, 1), generator=generator)
        inputs = {"tokens": tokens, "mask": torch.arange(model.max_tokens) < lengths}
        segments = torch.randint(2, tokens.shape, generator=generator)
        return inputs | ({"segments": segments} if model.num_classes else {})
    size = (batch, model.channels, model.image_size, model.image_size)
    return {"images": torch.randn(size, generator=generator).to(DTYPES[dtype])}


def _exported(program: Program, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in inputs)
    return torch.export.export(program, tuple(inputs.values()), dynamic_shapes=shapes)


def _describe(net: Network, folder: Path, dtype: str, inputs: dict[str, Tensor]) -> None:
    """What it takes and gives, beside it."""
    shapes = {name: ["batch", *values.shape[1:]] for name, values in inputs.items()}
    write_json(folder / CONFIG_NAME, {"inputs": shapes, "dtype": dtype} | net.card.model_dump(mode="json"))
