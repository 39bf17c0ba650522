"""Make the picture of a page that the documentation shows: results/page.png.

python scripts/page_picture.py [--page page.html]

Diagnoses EfficientNet-Lite0 on the embedded emoji in batches of 16 labels with 2 images each, opens the page in
headless Chromium at the width of a phone, and puts its upper part, in light, beside its plots, in dark. Takes a minute.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from browser import Browser
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 430, 1320
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation, as these weights want images
COLORS = 200  # of the picture, which is small so


def diagnosed(path: Path) -> None:
    """Write the page of a diagnosis."""
    import torch

    import finetune_bn as fbn
    from finetune_bn.data import EmojiData
    from finetune_bn.diagnosis.diagnosis_page import diagnosis_page

    torch.manual_seed(0)
    data = EmojiData(
        target="identity", image_size=64, batch_size=32, images_per_label=2, train_size=1000, mean=HALF, std=HALF
    )
    data.setup("fit")
    model = fbn.create_backbone("tf_efficientnet_lite0", "package", num_classes=data.num_classes)
    found = fbn.diagnose(model, data.train_dataloader(), optimizer="adamw", lr=1e-3, max_images=512)
    path.write_text(diagnosis_page(found.to_dict(), fbn.advise(found).to_dict()), encoding="utf-8")


def picture(path: Path) -> Image.Image:
    """Return the upper part of a page in light and, beside it, the plots of the layers in dark."""
    both = Image.new("RGB", (2 * WIDTH + 10, HEIGHT), "gray")
    with Browser.start() as browser, tempfile.TemporaryDirectory() as folder:
        for i, dark in enumerate((False, True)):
            page = browser.open(path, width=WIDTH, height=HEIGHT, dark=dark)
            top = 0
            if dark:
                page.hover(".linked svg.bars rect:nth-of-type(12)")
                top = page.evaluate("document.querySelector('.linked').getBoundingClientRect().y + scrollY - 50")
            page.screenshot(Path(folder, "page.png"), top, HEIGHT)
            both.paste(Image.open(Path(folder, "page.png")), (i * (WIDTH + 10), 0))
    return both


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="a page that is there already, in place of a diagnosis")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "page.png")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        page = options.page or Path(folder, "page.html")
        if options.page is None:
            diagnosed(page)
        buffer = io.BytesIO()
        picture(page).quantize(COLORS).save(buffer, "PNG", optimize=True)
    options.output.write_bytes(buffer.getvalue())
    print(f"{options.output.name}: {len(buffer.getvalue()) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
