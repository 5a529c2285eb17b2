"""README.md of an exported network: what it is, what it was trained on, its accuracy by depth, how to load it."""

from acn_scale.config import BertConfig
from acn_scale.convert.network import Card
from acn_scale.depth import cost

LOAD_TEXT = """\
from transformers import AutoModelFor{task}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelFor{task}.from_pretrained("FOLDER"{trust})
logits = model(**tokenizer("Some text.", return_tensors="pt")).logits"""

LOAD_IMAGES = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = AutoModelForImageClassification.from_pretrained("FOLDER"{trust})
logits = model(**processor(Image.open("image.png"), return_tensors="pt")).logits"""


def model_card(card: Card, *, plain: bool, dtype: str) -> str:
    """`plain`: Transformers has this network itself, and needs no code of ours."""
    model = card.model
    size = cost(model, model.depth)
    task = "SequenceClassification" if model.num_classes else "MaskedLM"
    load = LOAD_TEXT if isinstance(model, BertConfig) else LOAD_IMAGES
    code = load.format(task=task, trust="" if plain else ", trust_remote_code=True")
    joined = "a standard residual network" if plain else f"its blocks joined by the pattern `{model.connectivity}`"
    cut = f"cut after {model.depth} of {card.full_depth} blocks" if model.depth < card.full_depth else "whole"
    step = f", step {card.step:,}" if card.step is not None else ""
    average = ", the moving average of the weights" if card.average else ""
    front = "---\nlibrary_name: transformers\ntags: [acn_scale, auto-compressing-network]\n---\n"
    parts = [
        f"{front}# {card.run or card.source}",
        f"A {model.name} of acn_scale, {joined}; {cut}: {size.parameters:,} parameters in {dtype}, "
        f"{size.flops / 1e6:,.1f} million FLOPs for an input.",
        f"Weights: {card.source}{step}{average}.",
        *_trained_on(card),
        *_curve(card),
        f"## How to load it\n\n```python\n{code}\n```",
    ]
    if not plain:
        parts.append(
            "Its code is `modeling_acn_scale.py` in this folder; Transformers runs it because of `trust_remote_code`."
        )
    return "\n\n".join(parts) + "\n"


def _trained_on(card: Card) -> list[str]:
    masked = f", {card.masks.mask_ratio:.0%} of its tokens masked" if card.masks else ""
    lines = [f"Trained on {card.data}{masked}."] if card.data else []
    if card.images:
        lines.append(
            f"Classes: {len(card.images.classes)}. Pixels: mean {card.images.mean}, deviation {card.images.std}."
        )
    elif card.classes:
        lines.append(f"Classes: {', '.join(card.classes)}.")
    return lines


def _curve(card: Card) -> list[str]:
    """A cut at a depth is the same head on the readout there."""
    if card.accuracy is None:
        return []
    rows = ["| depth | accuracy (%) |", "|---|---|"]
    rows += [
        f"| {depth}{' (this network)' * (depth == card.model.depth)} | {100 * value:.1f} |"
        for depth, value in enumerate(card.accuracy)
    ]
    return [f"## Accuracy by depth\n\nOn held-out data, at step {card.evaluated_at:,} of the run.", "\n".join(rows)]
