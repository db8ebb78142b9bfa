"""Recipes of real size: read by both scripts, built, and predicted; docs/recipes.md states the figures they give."""

import re
from pathlib import Path

import pytest
import torch

from arguments import (
    FLAGS,
    REPOSITORY,
    ArgumentParser,
    AuxiliaryPeerArguments,
    CollaborationArguments,
    HFTrainerArguments,
    TrainerPeerArguments,
    shared_flags,
)
from src import LeanAlbertConfig, LeanAlbertForPreTraining
from src.models.memory import predict_memory
from src.optim.schedules import learning_rate, sequence_length
from src.preflight import __main__ as preflight
from src.preflight.machine import SHARED_COPIES, Workload, needed_memory
from src.swarm.compression import EIGHT_BIT_THRESHOLD

RECIPES = sorted(path.name for path in (REPOSITORY / "recipes").iterdir())
FAITHFUL = [recipe for recipe in RECIPES if (REPOSITORY / "recipes" / recipe / "modern.args").exists()]
KINDS = {"trainer": TrainerPeerArguments, "aux": AuxiliaryPeerArguments}
TEXT = ["--dataset_sources", "texts/*.txt"]
DEADLINES = {"samples a second to end in 7 days": 7, "in 30 days": 30, "in 90 days": 90}
PUBLISHED = {
    "target_batch_size": 16384, "total_steps": 15625, "warmup_steps": 3125, "num_zero_lr_steps": 50,
    "learning_rate": 2.5e-3, "initial_sequence_length": 256, "max_sequence_length": 2048,
    "sequence_length_warmup_steps": 7000, "pad_to_multiple_of": 128,
}  # fmt: skip


def parse(recipe: str, role: str, *words: str):
    """The three dataclass instances with which a peer that starts a run of this recipe works."""
    parser = ArgumentParser(KINDS[role], CollaborationArguments, HFTrainerArguments, prog="script.py")
    own = ["--run_id", "mine", *TEXT[: 2 * (role != "aux")]]
    peer, *others = parser.parse([f"@recipes/{recipe}/{role}.args", *words, *own])
    parser.require_own_run(peer)
    return peer, *others


def config_of(recipe: str) -> LeanAlbertConfig:
    return LeanAlbertConfig.from_json_file(REPOSITORY / "recipes" / recipe / "config.json")


def test_there_are_four_recipes_of_which_one_is_modern_from_the_start():
    assert RECIPES == ["base", "ruleanalbert", "small", "tiny"]
    assert FAITHFUL == ["base", "ruleanalbert", "small"]
    _, _, training = parse("tiny", "trainer")
    assert (training.optimizer, training.sentence_order, training.mlm_probability) == ("muon", False, 0.3)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("role", KINDS)
def test_recipe_is_found_from_any_folder_and_names_a_model_but_nobodys_text(tmp_path, monkeypatch, recipe, role):
    monkeypatch.chdir(tmp_path)
    peer, _, training = parse(recipe, role)
    assert Path(peer.model_config_path) == REPOSITORY / "recipes" / recipe / "config.json"
    assert Path(peer.tokenizer_path) == Path("tokenizer")  # of the person who starts it, not the demo's
    assert training.total_steps > training.warmup_steps > training.num_zero_lr_steps


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_peers_of_a_recipe_share_what_they_must(recipe):
    def values(role):
        groups = parse(recipe, role)
        return {
            name: getattr(group, name)
            for name in shared_flags(trainer=True)
            for group in groups
            if hasattr(group, name)
        }

    assert values("trainer") == values("aux")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_itself_what_its_peers_share(recipe):
    """Whoever reads it sees the schedule, and a later default does not change the run."""
    words = re.sub("#.*", "", (REPOSITORY / "recipes" / recipe / "swarm.args").read_text()).split()
    left_to_defaults = {
        "clamp_value", "min_8bit_size", "min_learning_rate", "decay_steps", "final_mlm_probability", "robust_averaging",
        "local_steps_after", "outer_learning_rate", "outer_momentum",
    }  # fmt: skip
    own = {word.removeprefix("--") for word in words if word.startswith("--")}
    assert own >= {"model_config_path", "tokenizer_path", *shared_flags(trainer=True)} - left_to_defaults


@pytest.mark.parametrize("recipe", FAITHFUL)
@pytest.mark.parametrize("role", KINDS)
def test_modern_recipe_changes_what_it_names_and_nothing_else(recipe, role):
    faithful, modern = (
        {name: getattr(group, name) for name in FLAGS for group in groups if hasattr(group, name)}
        for groups in (parse(recipe, role), parse(recipe, role, f"@recipes/{recipe}/modern.args"))
    )
    changed = {name: modern[name] for name in modern if modern[name] != faithful[name]}
    rate = {"learning_rate": 1e-2} if recipe == "small" else {}
    assert changed == rate | {
        "optimizer": "muon", "mlm_probability": 0.3, "final_mlm_probability": 0.15, "sentence_order": False,
        "schedule": "wsd",
    }  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_schedules_of_a_recipe_reach_their_ends(recipe):
    _, _, training = parse(recipe, "trainer")
    rate = {name: getattr(training, name) for name in ("min_learning_rate", "warmup_steps", "total_steps")}
    rates = [
        learning_rate(
            epoch, peak_learning_rate=training.learning_rate, num_zero_steps=training.num_zero_lr_steps, **rate
        )
        for epoch in (training.warmup_steps, training.total_steps)
    ]
    assert rates == pytest.approx([training.learning_rate, 0.02 * training.learning_rate])
    names = ("max_sequence_length", "initial_sequence_length", "sequence_length_warmup_steps", "pad_to_multiple_of")
    lengths = {name: getattr(training, name) for name in names}
    assert sequence_length(0, **lengths) == training.initial_sequence_length
    share_of_full_length = 0.5 if recipe in FAITHFUL else 0.4
    full = round((1 - share_of_full_length) * training.total_steps)
    assert sequence_length(full, **lengths) == training.max_sequence_length


@pytest.mark.parametrize("recipe", RECIPES)
def test_model_of_a_recipe_is_built_and_a_trainer_of_it_predicted(recipe):
    config = config_of(recipe)
    with torch.device("meta"):
        model = LeanAlbertForPreTraining(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    _, _, training = parse(recipe, "trainer")
    config.sparse_prediction = True
    config.activation_memory = training.activation_memory or config.activation_memory
    memory = predict_memory(
        config, batch_size=training.per_device_train_batch_size, length=training.max_sequence_length
    )
    assert memory.parameters == 4 * count
    assert 2 * memory.parameters < memory.device < 10e9


def test_smallest_recipe_is_the_size_for_first_experiments():
    config = config_of("small")
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (6, 512, 2048)
    LeanAlbertForPreTraining(config)


def test_published_model_is_a_recipe_with_the_published_schedule():
    config = config_of("ruleanalbert")
    assert (config.hidden_size, config.num_hidden_layers, config.num_hidden_groups) == (4096, 32, 32)
    assert (config.share_large_matrices, config.intermediate_size, config.hidden_act_gated) == (1, 16384, True)
    groups = parse("ruleanalbert", "trainer")
    found = {name: getattr(group, name) for name in PUBLISHED for group in groups if hasattr(group, name)}
    assert found == PUBLISHED


def figures(recipe: str) -> dict[str, str]:
    """What docs/recipes.md says of a recipe, from the recipe itself."""
    _, collaboration, training = parse(recipe, "trainer")
    config = config_of(recipe)
    config.sparse_prediction = True
    config.activation_memory = training.activation_memory or config.activation_memory
    batch, length = training.per_device_train_batch_size, training.max_sequence_length
    trainer, auxiliary = Workload.of(training), Workload(training.min_8bit_size)
    on_gpu = needed_memory(config, trainer, on_gpu=True)
    needed = [*on_gpu.values(), *(needed_memory(config, one, on_gpu=False)["memory"] for one in (trainer, auxiliary))]
    machine, gpu, trainer, auxiliary = (f"{sum(parts.values()) / 1e9:.1f} GB" for parts in needed)
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in LeanAlbertForPreTraining(config).parameters()]
    # gradients in 8 bits, small ones in 16, every epoch; parameters in 16 bits now and then
    sent = sum(size if size >= EIGHT_BIT_THRESHOLD else 2 * size for size in sizes)
    sent += 2 * sum(sizes) / collaboration.average_state_every
    samples = training.total_steps * collaboration.target_batch_size
    return {
        "parameters": f"{sum(sizes) / 1e6:.1f} million",
        "batch of a trainer": f"{batch} x {length} tokens",
        "GPU memory of a trainer": gpu,
        "and of its machine": machine,
        "memory of a trainer without a GPU": trainer,
        "memory of an auxiliary peer": auxiliary,
        "shared memory of each": f"{SHARED_COPIES * 4 * sum(sizes) / 1e9:.1f} GB",
        "sent in an epoch, and received: client": f"{sent / 1e6:.0f} MB",
        "the same, one that can be reached": f"up to {2 * sent / 1e6:.0f} MB",
        **{name: whole_or_first_digit(samples / days / 86400) for name, days in DEADLINES.items()},
    }


def whole_or_first_digit(value: float) -> str:
    return f"{value:.0f}" if value >= 1 else f"{value:.1g}"


def test_page_of_the_recipes_states_what_they_give():
    page = (REPOSITORY / "docs" / "recipes.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    order = ["tiny", "small", "base", "ruleanalbert"]
    of = {recipe: figures(recipe) for recipe in order}
    expected = {name: [of[recipe][name] for recipe in order] for name in of["small"]}
    assert {name: cells for name, *cells in rows if name in expected} == expected, "\n".join(
        f"| {name} | {' | '.join(cells)} |" for name, cells in expected.items()
    )


PLAN = re.compile(r"```text\n\$ python -m src.preflight (plan .*)\n([^`]*)```")


def test_page_of_the_recipes_shows_the_plan_of_each(capsys):
    plans = PLAN.findall((REPOSITORY / "docs" / "recipes.md").read_text())
    assert [re.search("@recipes/(.*)/trainer.args", command)[1] for command, _ in plans] == [
        "tiny", "small", "base", "ruleanalbert",
    ]  # fmt: skip
    for command, output in plans:
        assert preflight.main(command.split()) == 0
        assert capsys.readouterr().out == output, command


@pytest.mark.parametrize("recipe", RECIPES)
def test_comments_of_a_recipe_name_commands_and_flags_that_exist(recipe):
    for file in (REPOSITORY / "recipes" / recipe).glob("*.args"):
        for flag in re.findall(r"--(\w+)", " ".join(re.findall("#.*", file.read_text()))):
            assert flag in FLAGS or flag in ("sources", "vocab_size", "output"), f"{file}: --{flag}"
    vocab_size = re.search(r"--vocab_size (\d+)", (REPOSITORY / "recipes" / recipe / "swarm.args").read_text())[1]
    assert int(vocab_size) <= config_of(recipe).vocab_size
