import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from src import (
    LeanAlbertConfig,
    LeanAlbertForMaskedLM,
    LeanAlbertForPreTraining,
    LeanAlbertForSequenceClassification,
    LeanAlbertModel,
)

MODELS = [LeanAlbertModel, LeanAlbertForPreTraining, LeanAlbertForMaskedLM, LeanAlbertForSequenceClassification]
WITH_DECODER = [LeanAlbertForPreTraining, LeanAlbertForMaskedLM]


def assert_tied(model, tied):
    assert (model.predictions.decoder.weight is model.albert.embeddings.word_embeddings.weight) == tied
    assert model.predictions.decoder.bias is model.predictions.bias
    assert model.predictions.decoder.weight.shape == (model.config.vocab_size, model.config.embedding_size)
    assert model.predictions.bias.shape == (model.config.vocab_size,)


def test_state_dict_keys_of_a_tiny_model_are_frozen(tiny_config):
    """Checkpoints of others depend on these names: a change here breaks them all."""
    options = {"adapter_dim": 2, "lowrank_dim": 2, "sandwich_norm": True, "position_embedding_type": "absolute"}
    config = tiny_config(**options, out_proj_bias=True, num_hidden_layers=2, num_inner_groups=2)
    expected = Path(__file__).with_name("state_dict_keys.txt").read_text().split()
    assert list(LeanAlbertForPreTraining(config).state_dict()) == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_class", WITH_DECODER)
def test_decoder_is_tied_from_construction_through_resize_save_and_load(tiny_config, tmp_path, model_class, tied):
    model = model_class(tiny_config(tie_word_embeddings=tied))
    assert_tied(model, tied)
    for size in (70, 65, 65):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size
        assert_tied(model, tied)
    model.save_pretrained(tmp_path)
    assert_tied(model_class.from_pretrained(tmp_path), tied)


def test_resize_keeps_the_logits_of_old_tokens(tiny_config, randomise, encoder_inputs):
    model = randomise(LeanAlbertForMaskedLM(tiny_config())).eval()
    before = model(**encoder_inputs).logits
    model.resize_token_embeddings(70)
    after = model(**encoder_inputs).logits
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., :61], before)


def test_readme_lines_load_a_published_state_file(tiny_config, randomise, tmp_path):
    trained = randomise(LeanAlbertForPreTraining(tiny_config(vocab_size=64, share_large_matrices=1)))
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(share_large_matrices=1).to_dict()))
    torch.save({"model": trained.state_dict(), "scheduler": {"last_epoch": 7}}, tmp_path / "state.pth")

    config = LeanAlbertConfig.from_pretrained(str(tmp_path / "config.json"))
    model = LeanAlbertForPreTraining(config)
    model.resize_token_embeddings(64)
    state = torch.load(tmp_path / "state.pth", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    assert_tied(model, True)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"share_large_matrices": True, "adapter_dim": 2},
        {"share_large_matrices": 2, "lowrank_dim": 2, "position_embedding_type": "absolute"},
        {"num_hidden_groups": 1, "num_inner_groups": 2},
    ],
)
@pytest.mark.parametrize("model_class", MODELS)
def test_save_and_load_give_equal_outputs(tiny_config, randomise, batch, tmp_path, model_class, options, tied):
    model = randomise(model_class(tiny_config(**options, tie_word_embeddings=tied))).eval()
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    torch.testing.assert_close(loaded.eval()(**inputs).to_tuple(), model(**inputs).to_tuple(), rtol=0, atol=0)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


def test_auto_classes_know_our_classes(tiny_config, tmp_path):
    LeanAlbertForPreTraining(tiny_config()).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LeanAlbertConfig
    expected = {
        AutoModel: LeanAlbertModel,
        AutoModelForPreTraining: LeanAlbertForPreTraining,
        AutoModelForMaskedLM: LeanAlbertForMaskedLM,
        AutoModelForSequenceClassification: LeanAlbertForSequenceClassification,
    }
    assert {auto: type(auto.from_pretrained(tmp_path)) for auto in expected} == expected


def test_masked_lm_takes_over_a_pretraining_checkpoint(tiny_config, randomise, encoder_inputs, tmp_path):
    trained = randomise(LeanAlbertForPreTraining(tiny_config())).eval()
    trained.save_pretrained(tmp_path)
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(model.eval()(**encoder_inputs).logits, trained(**encoder_inputs).prediction_logits)


def test_fill_mask_pipeline_returns_the_most_likely_words(tiny_config, randomise):
    words = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", *(f"слово{i}" for i in range(56))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", mask_token="[MASK]"
    )
    model = randomise(LeanAlbertForMaskedLM(tiny_config())).eval()
    answers = pipeline("fill-mask", model=model, tokenizer=tokenizer)("слово1 [MASK] слово3", top_k=2)
    logits = model(**tokenizer("слово1 [MASK] слово3", return_tensors="pt")).logits[0, 1]
    assert [answer["token"] for answer in answers] == logits.topk(2).indices.tolist()


@pytest.mark.parametrize("model_class", WITH_DECODER)
def test_sparse_prediction_gives_the_same_loss_and_gradients(tiny_config, randomise, batch, model_class):
    if model_class is LeanAlbertForMaskedLM:
        del batch["sentence_order_label"]
    results = []
    for sparse in (False, True):
        model = randomise(model_class(tiny_config(sparse_prediction=sparse)).double()).eval()
        outputs = model(**batch)
        outputs.loss.backward()
        results.append((outputs, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (dense, dense_gradients), (sparse, sparse_gradients) = results
    name = "logits" if model_class is LeanAlbertForMaskedLM else "prediction_logits"
    assert sparse[name].shape == (5, 61)
    torch.testing.assert_close(sparse[name], dense[name][batch["labels"] != -100])
    torch.testing.assert_close(sparse.loss, dense.loss)
    torch.testing.assert_close(sparse_gradients, dense_gradients)
    assert model(batch["input_ids"])[name].shape == (2, 11, 61)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_class", WITH_DECODER)
def test_training_without_logits_gives_the_same_loss_and_gradients(tiny_config, randomise, batch, model_class, tied):
    if model_class is LeanAlbertForMaskedLM:
        del batch["sentence_order_label"]
    name = "logits" if model_class is LeanAlbertForMaskedLM else "prediction_logits"
    results = []
    for sparse in (False, True):
        config = tiny_config(sparse_prediction=sparse, tie_word_embeddings=tied, classifier_dropout_prob=0.0)
        model = randomise(model_class(config).double()).train()
        outputs = model(**batch)
        (-3 * outputs.loss).backward()
        results.append((outputs.loss, {key: parameter.grad for key, parameter in model.named_parameters()}))
        assert (name in outputs) != sparse
    torch.testing.assert_close(results[1], results[0])


def test_losses_are_means_over_what_has_a_label(tiny_config, randomise, batch):
    model = randomise(LeanAlbertForPreTraining(tiny_config())).eval()
    outputs = model(**batch)
    labelled = batch["labels"] != -100
    mlm_loss = F.cross_entropy(outputs.prediction_logits[labelled], batch["labels"][labelled])
    sop_loss = F.cross_entropy(outputs.sop_logits[:1], batch["sentence_order_label"][:1])
    torch.testing.assert_close(outputs.mlm_loss, mlm_loss)
    torch.testing.assert_close(outputs.sop_loss, sop_loss)
    torch.testing.assert_close(outputs.loss, mlm_loss + sop_loss)
    assert not outputs.mlm_loss.requires_grad and not outputs.sop_loss.requires_grad


@pytest.mark.parametrize("sparse", [False, True])
def test_losses_without_any_label_are_zero(tiny_config, batch, sparse):
    model = LeanAlbertForPreTraining(tiny_config(sparse_prediction=sparse))
    batch["labels"].fill_(-100)
    batch["sentence_order_label"].fill_(-100)
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_losses_that_are_not_asked_for_are_none(tiny_config, batch):
    model = LeanAlbertForPreTraining(tiny_config()).eval()
    labels, order = batch.pop("labels"), batch.pop("sentence_order_label")
    outputs = model(**batch)
    assert outputs.loss is outputs.mlm_loss is outputs.sop_loss is None
    only_words, only_order = model(**batch, labels=labels), model(**batch, sentence_order_label=order)
    assert only_words.sop_loss is None and torch.equal(only_words.loss, only_words.mlm_loss)
    assert only_order.mlm_loss is None and torch.equal(only_order.loss, only_order.sop_loss)


def test_embeddings_can_be_read_replaced_and_bypassed(tiny_config, encoder_inputs):
    model = LeanAlbertForMaskedLM(tiny_config()).eval()
    embeddings = model.get_input_embeddings()
    assert embeddings is model.albert.embeddings.word_embeddings
    assert model.get_output_embeddings() is model.predictions.decoder
    expected = model(**encoder_inputs).logits
    ids = encoder_inputs.pop("input_ids")
    torch.testing.assert_close(model(**encoder_inputs, inputs_embeds=embeddings(ids)).logits, expected)
    other = torch.nn.Embedding(61, 16)
    model.set_input_embeddings(other)
    model.tie_weights()
    assert model.predictions.decoder.weight is other.weight
    decoder = torch.nn.Linear(16, 61)
    model.set_output_embeddings(decoder)
    assert model.predictions.decoder is decoder and model.predictions.bias is decoder.bias
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


def test_return_dict_false_gives_a_tuple(tiny_config, batch):
    outputs = LeanAlbertForPreTraining(tiny_config())(**batch, return_dict=False)
    assert isinstance(outputs, tuple) and outputs[0].dim() == 0


def test_absolute_positions_end_with_a_clear_error(tiny_config):
    model = LeanAlbertModel(tiny_config(position_embedding_type="absolute"))
    with pytest.raises(ValueError, match="25 tokens is longer than max_position_embeddings=24"):
        model(torch.ones(1, 25, dtype=torch.long))
    assert LeanAlbertModel(tiny_config())(torch.ones(1, 25, dtype=torch.long)).last_hidden_state.isfinite().all()


def test_initial_values(tiny_config):
    model = LeanAlbertForPreTraining(tiny_config(hidden_size=256, adapter_dim=8, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name.endswith("adapter_second"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.03 < parameter.std() < 0.07, name
    assert (model.albert.embeddings.word_embeddings.weight[0] == 0).all()


@pytest.mark.parametrize("model_class", [LeanAlbertForPreTraining, LeanAlbertForMaskedLM])
def test_trainer_averages_the_loss_over_accumulated_batches(tiny_config, tmp_path, model_class):
    arguments = TrainingArguments(output_dir=str(tmp_path), gradient_accumulation_steps=2, report_to=[], use_cpu=True)
    trainer = Trainer(model_class(tiny_config()), arguments, train_dataset=[])
    assert not trainer.model_accepts_loss_kwargs


@pytest.mark.parametrize("level", ["default", "lean", "checkpoint"])
@pytest.mark.parametrize("packed", [False, True])
def test_last_layer_is_finished_where_a_loss_is_taken_only(tiny_config, randomise, batch, monkeypatch, packed, level):
    options = {"num_hidden_groups": 1, "hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
    config = tiny_config(**options, num_inner_groups=2, sparse_prediction=True, activation_memory=level)
    model = randomise(LeanAlbertForPreTraining(config)).train().double()
    batch |= {"instance_index": (torch.arange(11) // 4 + 1).repeat(2, 1)} if packed else {}
    batch["sentence_order_label"] = torch.tensor([1, -100, 0, 0, 1, 0] if packed else [1, -100])
    computed = []
    last = model.albert.transformer.layer_groups[0].layers[-1].ffn
    last.register_forward_hook(lambda module, inputs, outputs: computed.append(outputs.shape))
    found = model(**batch)
    found.loss.backward()
    assert computed[0] == (2, 11, 32) and computed[2] == (64, 32)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(model, "_needs_few_positions", lambda labels, options: False)
    expected = model(**batch)
    expected.loss.backward()
    torch.testing.assert_close(found.sop_logits, expected.sop_logits)
    torch.testing.assert_close([found.mlm_loss, found.sop_loss], [expected.mlm_loss, expected.sop_loss])
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()], rtol=1e-10, atol=1e-10)
