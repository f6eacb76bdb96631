"""GPT-NeoX: Pythia, StableLM-alpha, StableCode-alpha."""

from litgpt.families.base import named

_PYTHIA = {"block_size": 2048, "padding_multiple": 128}

MODELS = (
    named(
        _PYTHIA,
        ("EleutherAI/pythia-14m", 6, 128, 4, None, None, {"block_size": 512}),
        ("EleutherAI/pythia-31m", 6, 256, 8, None, None, {"block_size": 1024}),
        ("EleutherAI/pythia-70m{,-deduped}", 6, 512, 8, None, None),
        ("EleutherAI/pythia-160m{,-deduped}", 12, 768, 12, None, None),
        ("EleutherAI/pythia-410m{,-deduped}", 24, 1024, 16, None, None),
        ("EleutherAI/pythia-1b{,-deduped}", 16, 2048, 8, None, None),
        ("EleutherAI/pythia-1.4b{,-deduped}", 24, 2048, 16, None, None),
        ("EleutherAI/pythia-2.8b{,-deduped}", 32, 2560, 32, None, None),
        ("EleutherAI/pythia-6.9b{,-deduped}", 32, 4096, 32, None, None, {"padding_multiple": 256}),
        ("EleutherAI/pythia-12b{,-deduped}", 36, 5120, 40, None, None, {"padding_multiple": 512}),
    )
    | named(
        {},
        ("stabilityai/stablelm-{base,tuned}-alpha-3b", 16, 4096, 32, None, None),
        ("stabilityai/stablelm-{base,tuned}-alpha-7b", 16, 6144, 48, None, None, {"padding_multiple": 256}),
    )
    | named(
        {"vocab_size": 49152},
        ("stabilityai/stablecode-completion-alpha-3b", 32, 2560, 32, None, None, {"block_size": 16384}),
        ("stabilityai/stablecode-{completion-alpha-3b-4k,instruct-alpha-3b}", 32, 2560, 32, None, None),
    )
)
