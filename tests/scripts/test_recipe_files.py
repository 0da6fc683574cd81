"""The shipped recipes: every one loads, and is what its name says."""

from pathlib import Path

import pytest

from periln.runkit.recipes import differing_fields, from_mapping, read_yaml, to_mapping
from periln.scripts.costs import count_parameters
from periln.scripts.recipe import Recipe

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "recipes"
NAMES = sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem != "demo")
SIZES = {"1m": 1e6, "10m": 10e6, "60m": 60e6, "400m": 400e6, "1.5b": 1.5e9, "3.2b": 3.2e9}


def load(name: str) -> Recipe:
    recipe = from_mapping(Recipe, read_yaml(FOLDER / f"{name}.yaml"))
    recipe.check(processes=8 if SIZES[name.split("-")[0]] > 1e8 else 1)
    return recipe


def differences(name: str, base: str) -> list[str]:
    found = differing_fields(to_mapping(load(base)), to_mapping(load(name)))
    return [field for field in found if not field.startswith("name: ")]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_has_the_size_of_its_name(name):
    recipe = load(name)
    assert recipe.name == name
    meant = SIZES[name.split("-")[0]]
    assert abs(count_parameters(recipe.model_config()).non_embedding / meant - 1) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_the_recipes_of_gpus_are_compiled(name):
    assert load(name).compile == (SIZES[name.split("-")[0]] >= 400e6)


def test_the_papers_protocol_is_the_papers():
    for size, layers, heads, width, head_dim in (
        ("400m", 24, 8, 1024, 128),
        ("1.5b", 24, 16, 2048, 128),
        ("3.2b", 32, 16, 2560, 160),
    ):
        for placement in ("post", "pre", "peri"):
            recipe = load(f"{size}-{placement}")
            config, optimizer = recipe.model_config(), recipe.optimizer
            assert (config.num_hidden_layers, config.num_attention_heads) == (layers, heads)
            assert (config.hidden_size, config.head_dim) == (width, head_dim)
            assert (config.norm_placement, config.norm_type, config.tie_word_embeddings) == (
                placement,
                "rmsnorm",
                False,
            )
            assert config.embedding_norm is None and bool(config.stream_plan().embedding_norm) == (placement == "peri")
            assert (recipe.batch_size, recipe.sequence_length, recipe.steps) == (256, 8192, 14400)
            assert (optimizer.warmup, optimizer.weight_decay) == (0.1, 0.033)
            assert (optimizer.learning_rate == 2e-3) == (placement != "post")
            assert optimizer.learning_rate < 2e-3 or placement != "post"


@pytest.mark.parametrize(
    ("name", "base", "fields"),
    [
        ("400m-peri-layernorm", "400m-peri", ["model.norm_type: 'rmsnorm' -> 'layernorm'"]),
        *(
            (f"{size}-peri-no-embedding-norm", f"{size}-peri", ["model.embedding_norm: None -> False"])
            for size in ("400m", "1.5b", "3.2b")
        ),
        *(
            (
                f"{size}-olmo2",
                f"{size}-peri",
                ["model.norm_placement: 'peri' -> 'output'", "model.qk_norm: None -> 'full'"],
            )
            for size in ("400m", "1.5b", "3.2b")
        ),
        *(
            (
                f"{size}-peri-frozen-gamma",  # Figure 4 is without the norm on the embedding
                f"{size}-peri",
                ["model.embedding_norm: None -> False", "model.output_norm_learnable: None -> False"],
            )
            for size in ("400m", "1.5b")
        ),
        ("400m-pre-warmup30", "400m-pre", ["optimizer.warmup: 0.1 -> 0.3"]),
        ("400m-pre-8b-tokens", "400m-pre", ["steps: 14400 -> 3815"]),
        ("10m-pre", "10m-peri", ["model.norm_placement: 'peri' -> 'pre'"]),
    ],
)
def test_a_variant_differs_only_in_what_it_is_called_for(name, base, fields):
    assert differences(name, base) == fields


@pytest.mark.parametrize("placement", ["pre", "peri"])
def test_token_budgets_are_those_of_their_names(placement):
    budgets = {"8b-tokens": 8e9, "16b-tokens": 16e9, "seq2048": 14400 * 256 * 8192}
    for variant, tokens in budgets.items():
        recipe = load(f"400m-{placement}-{variant}")
        assert abs(recipe.steps * recipe.batch_size * recipe.sequence_length / tokens - 1) < 1e-3
