import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from src.models import LeanAlbertConfig, LeanAlbertModel
from tasks.finetuning.models import ChoiceModel, sequence_classifier

SIZES = {
    "initializer_range": 0.3,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 50,
}
BACKBONES = {
    "lean_albert": lambda: LeanAlbertModel(LeanAlbertConfig(**SIZES, embedding_size=8)),
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES)),
}
INPUT_IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 21, 32, 43, 3]])


@pytest.fixture(params=BACKBONES)
def backbone(request):
    torch.manual_seed(0)
    return BACKBONES[request.param]()


def test_sequence_classifier_is_built_around_the_given_backbone(backbone):
    model = sequence_classifier(backbone, num_labels=3, dropout=0.25)
    assert model.base_model is backbone
    output = model(input_ids=INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS), labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    output.loss.backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused


def test_sequence_classifier_dropout_is_that_of_the_classifier_alone(backbone):
    before = [module.p for module in backbone.modules() if isinstance(module, torch.nn.Dropout)]
    model = sequence_classifier(backbone, num_labels=2, dropout=0.375)
    assert [module.p for module in backbone.modules() if isinstance(module, torch.nn.Dropout)] == before
    head = [m for name, m in model.named_modules() if not name.startswith(model.base_model_prefix)]
    assert {module.p for module in head if isinstance(module, torch.nn.Dropout)} == {0.375}


def test_choice_model_scores_each_choice_by_itself(backbone):
    model = ChoiceModel(sequence_classifier(backbone, num_labels=1, dropout=0.1)).eval()
    first, second = INPUT_IDS
    rows = torch.stack([torch.stack(row) for row in ((first, second), (second, first), (second, second))])
    output = model(input_ids=rows, attention_mask=torch.ones_like(rows), labels=torch.tensor([0, 1, 0]))
    one, other = output.logits[0]
    assert (one - other).abs() > 1e-4
    expected = torch.stack([torch.stack(row) for row in ((one, other), (other, one), (other, other))])
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    losses = -expected.log_softmax(1)[torch.arange(3), torch.tensor([0, 1, 0])]
    torch.testing.assert_close(output.loss, losses.mean(), rtol=1e-5, atol=1e-5)


def test_choice_model_has_no_loss_without_labels(backbone):
    model = ChoiceModel(sequence_classifier(backbone, num_labels=1, dropout=0.1))
    assert model(input_ids=INPUT_IDS[None]).loss is None
