import pytest
import torch
from transformers import TrainingArguments

from benchmarks import whole_trainer
from benchmarks.reference.lean_layers import original_encoder
from src.models import load_tokenizer

SIZES = {
    **whole_trainer.SIZES,
    "vocab_size": 4000,
    "embedding_size": 8,
    "hidden_size": 16,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
}
LENGTH = 32


@pytest.fixture
def arguments(tmp_path):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 100,
        "per_device_train_batch_size": whole_trainer.MICRO_BATCH,
        "gradient_accumulation_steps": whole_trainer.MICRO_STEPS,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def test_each_call_makes_one_step_and_counts_only_the_tokens_it_trained_on(arguments):
    tokenizer = load_tokenizer(str(whole_trainer.DEMO / "tokenizer"))
    files = sorted(map(str, (whole_trainer.DEMO / "corpus").glob("*.txt")))
    run, count = whole_trainer.hugging_face(SIZES, tokenizer, files, LENGTH, arguments)
    for number in (1, 2, 3):
        run()
        assert run.trainer.state.global_step == number
        assert count.tokens == number * whole_trainer.MICRO_BATCH * whole_trainer.MICRO_STEPS * LENGTH
    run.end()
    assert not run.thread.is_alive() and run.failure is None


def test_failure_of_a_step_reaches_the_caller(arguments):
    trainer = whole_trainer.Trainer(model=torch.nn.Linear(1, 1), args=TrainingArguments(**arguments))
    with pytest.raises(ValueError, match="train_dataset"):
        whole_trainer.StepByStep(trainer)()


def test_padding_changes_nothing_in_the_original_layers():
    transformer = whole_trainer.lean_model(SIZES, sparse_prediction=False).albert.transformer
    states = torch.randn(1, 7, 16)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        padded = original_encoder(transformer, states, mask)[:, :4]
        torch.testing.assert_close(padded, original_encoder(transformer, states[:, :4]))
        torch.testing.assert_close(padded, transformer(states, mask)[0][:, :4])


def test_offloaded_lamb_steps_as_lamb_does_and_hands_the_parameters_back():
    results = []
    for kind in (whole_trainer.CPULAMB8Bit, whole_trainer.OffloadedLamb):
        torch.manual_seed(0)
        model = whole_trainer.lean_model(SIZES, sparse_prediction=True)
        lamb = kind(whole_trainer.parameter_groups(model, 0.01), **whole_trainer.LAMB)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        lamb.step()
        results.append(list(model.parameters()))
    assert set(lamb.param_groups[0]["params"]).isdisjoint(model.parameters())
    torch.testing.assert_close(results[1], results[0])


def test_trainer_for_a_gpu_steps_with_lamb_in_main_memory(arguments):
    tokenizer = load_tokenizer(str(whole_trainer.DEMO / "tokenizer"))
    files = sorted(map(str, (whole_trainer.DEMO / "corpus").glob("*.txt")))
    run, count = whole_trainer.ours(SIZES, tokenizer, files, LENGTH, {**arguments, "use_cpu": False})
    model = run.trainer.model
    before = [parameter.detach().clone() for parameter in model.parameters()]
    run()
    run.end()
    assert run.failure is None and count.tokens > 0
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_counting_tokens_does_not_wait_for_the_device():
    count = whole_trainer.TokenCount(torch.nn.Identity())
    count.add(
        None, (), {"input_ids": torch.ones(2, 3, device="meta"), "attention_mask": torch.ones(2, 3, device="meta")}
    )
    assert count.counted.device.type == "meta"
    count = whole_trainer.TokenCount(torch.nn.Identity())
    count.add(None, (), {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    count.add(None, (), {"input_ids": torch.ones(2, 3)})  # a mask that hides nothing has been left out
    assert count.tokens == 11
