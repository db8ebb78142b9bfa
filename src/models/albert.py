"""LeanALBERT: embeddings, encoder, and models for pretraining, masked-LM and sequence classification."""

import itertools
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .activations import get_activation
from .attention_core import Spans
from .butterfly import ButterflyMatrix
from .config import LeanAlbertConfig
from .linear_cross_entropy import linear_cross_entropy
from .shared_linear import SharedLinear, SharedMatrix
from .transformer import LeanTransformer

IGNORED_LABEL = -100
DECODER_WEIGHT = "predictions.decoder.weight"


class LeanAlbertEmbeddings(nn.Module):
    """Sum of word, token type and (if absolute) position embeddings; layer norm; projection to hidden_size."""

    def __init__(self, config):
        super().__init__()
        size, num_positions = config.embedding_size, config.max_position_embeddings
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.position_embeddings = None
        if config.position_embedding_type == "absolute":
            self.position_embeddings = nn.Embedding(num_positions, size)
            self.register_buffer("position_ids", torch.arange(num_positions)[None])
        self.layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.embedding_hidden_mapping = nn.Linear(size, config.hidden_size) if size != config.hidden_size else None

    def forward(self, input_ids=None, token_type_ids=None, *, position_ids=None, inputs_embeds=None):
        """[batch, length] ids (or word vectors [batch, length, embedding_size]) -> [batch, length, hidden_size]."""
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if token_type_ids is None:
            embeddings = inputs_embeds + self.token_type_embeddings.weight[0]
        else:
            embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = self._default_positions(embeddings.shape[1])
            embeddings = embeddings + self.position_embeddings(position_ids)
        embeddings = self.dropout(self.layer_norm(embeddings))
        return embeddings if self.embedding_hidden_mapping is None else self.embedding_hidden_mapping(embeddings)

    def _default_positions(self, length):
        limit = self.position_ids.shape[1]
        if length > limit:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_position_embeddings={limit}; truncate it, or "
                'train with position_embedding_type="rotary", which has no limit'
            )
        return self.position_ids[:, :length]


class LeanAlbertPreTrainedModel(PreTrainedModel):
    """Initialisation, and which parameters have more than one name."""

    config: LeanAlbertConfig
    base_model_prefix = "albert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LeanBlock"]
    # Without this, Trainer takes **kwargs of `forward` for a promise to average the loss over accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(refuse_conflicting_aliases)

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, SharedMatrix):
            init.normal_(module.weight, std=std)
            if isinstance(module, ButterflyMatrix):
                for buffer, indices in zip(module.buffers(recurse=False), module.make_indices(), strict=True):
                    init.copy_(buffer, indices)
            if module.lowrank_first is not None:
                # The entries of the product of both factors have variance std^2 * rank / in_features.
                init.normal_(module.lowrank_first, std=module.in_features**-0.5)
                init.normal_(module.lowrank_second, std=std)
        elif isinstance(module, SharedLinear):
            if module.bias is not None:
                init.zeros_(module.bias)
            if module.adapter_first is not None:
                init.normal_(module.adapter_first, std=std)
                init.zeros_(module.adapter_second)
        elif isinstance(module, MaskedLMHead):
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            super()._init_weights(module)
        elif isinstance(module, LeanAlbertEmbeddings) and module.position_embeddings is not None:
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[1])[None])

    def get_expanded_tied_weights_keys(self, all_submodels=False):
        """{alias: name} of parameters (not buffers, which transformers looks up elsewhere) with several names.

        transformers knows none of them when tie_word_embeddings is False, but that option concerns the decoder's
        weight alone: matrices of shared layers and the output bias have several names all the same.
        """
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        aliases = dict(self._tied_weights_keys or {})
        if not self.config.tie_word_embeddings:
            aliases.pop(DECODER_WEIGHT, None)
        buffers = {name for name, _ in self.named_buffers(remove_duplicate=False)}
        return {alias: name for alias, name in aliases.items() if alias not in buffers}


class LeanAlbertModel(LeanAlbertPreTrainedModel):
    """The encoder, with a pooler (dense + tanh over the first token) unless `add_pooling_layer` is False."""

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config)
        self.embeddings = LeanAlbertEmbeddings(config)
        self.transformer = LeanTransformer(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self._tied_weights_keys = find_aliases(self)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        wanted=None,
    ):
        """last_hidden_state [batch, length, hidden_size], pooler_output [batch, hidden_size] or None.

        attention_mask and position_ids: see `LeanTransformer.forward`. With `wanted` positions (see there)
        last_hidden_state is [wanted, hidden_size], and nothing is pooled.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, and not both")
        if output_attentions:
            raise ValueError("output_attentions=True: attention probabilities are never materialised in this model")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        embeddings = self.embeddings(input_ids, token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds)
        last_hidden_state, hidden_states = self.transformer(
            embeddings,
            attention_mask,
            position_ids=position_ids,
            output_hidden_states=output_hidden_states,
            wanted=wanted,
        )
        pooler_output = None
        if self.pooler is not None and wanted is None:
            pooler_output = self.pool(last_hidden_state[:, 0])
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state, pooler_output=pooler_output, hidden_states=hidden_states
        )

    def pool(self, first_states):
        """Of first tokens, [..., hidden_size] -> the same."""
        return torch.tanh(self.pooler(first_states))


def find_aliases(module):
    """{other name: first name} of the parameters and buffers that a module reaches under several names."""
    first_names, aliases = {}, {}
    named_parameters = module.named_parameters(remove_duplicate=False)
    named_buffers = module.named_buffers(remove_duplicate=False)
    for name, tensor in itertools.chain(named_parameters, named_buffers):
        first_name = first_names.setdefault(tensor, name)
        if first_name != name:
            aliases[name] = first_name
    return aliases


def refuse_conflicting_aliases(model, state_dict, prefix, _metadata, _strict, _missing, _unexpected, error_messages):
    """Hook of load_state_dict: two different values for one tensor are an error, not "the last one wins"."""
    for alias, name in model.get_expanded_tied_weights_keys().items():
        first, second = state_dict.get(prefix + name), state_dict.get(prefix + alias)
        if first is None or second is None or first.data_ptr() == second.data_ptr() or torch.equal(first, second):
            continue
        hint = " (if they should, pass tie_word_embeddings=False)" if alias == DECODER_WEIGHT else ""
        error_messages.append(f"{prefix + alias} and {prefix + name} differ, but are one tensor here{hint}")


class MaskedLMHead(nn.Module):
    """dense to embedding_size, activation, layer norm (eps 1e-5 whatever the config says), decoder with bias."""

    def __init__(self, config):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.layer_norm = nn.LayerNorm(config.embedding_size, eps=1e-5)
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)  # tie_weights makes its bias `self.bias`
        self.activation = get_activation(config.hidden_act)

    def forward(self, hidden_states):
        """[..., hidden_size] -> logits [..., vocab_size]."""
        return self.decoder(self.transform(hidden_states))

    def transform(self, hidden_states):
        """[..., hidden_size] -> what is compared with the word vectors, [..., embedding_size]."""
        return self.layer_norm(self.activation(self.dense(hidden_states)))


class SentenceOrderHead(nn.Module):
    """Whether the two segments are swapped (ALBERT, arXiv 1909.11942), from the pooled first token."""

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, pooler_output):
        return self.classifier(self.dropout(pooler_output))


def mean_cross_entropy(logits, labels):
    """Mean over the labels that are not -100; 0 rather than NaN when there are none. Computed in fp32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)


def masked_lm_loss(head, hidden_states, labels, *, sparse):
    """Logits and loss (None without labels).

    Logits: [batch, length, vocab_size]; if `sparse` and with labels [num_labels, vocab_size], or None while training,
    when the loss is computed without ever holding them all.
    """
    if labels is None:
        return head(hidden_states), None
    if not sparse:
        logits = head(hidden_states)
        return logits, mean_cross_entropy(logits.flatten(0, -2), labels.flatten())
    labelled = find_labelled(labels)
    hidden_states = hidden_states.flatten(0, 1).index_select(0, labelled)
    return labelled_loss(head, hidden_states, labels.flatten().index_select(0, labelled))


def find_labelled(labels):
    """[num_labels] positions, in the rows put end to end, of what is to be predicted.

    The host waits for a GPU here: the number of labels is the size of all that follows.
    """
    return (labels.flatten() != IGNORED_LABEL).nonzero().squeeze(1)


def labelled_loss(head, hidden_states, labels):
    """Logits [num_labels, vocab_size] (None while training) and loss of [num_labels, hidden_size] and [num_labels]."""
    if head.training and not torch.compiler.is_compiling():
        decoder = head.decoder
        return None, linear_cross_entropy(head.transform(hidden_states), decoder.weight, decoder.bias, labels)
    logits = head(hidden_states)
    return logits, mean_cross_entropy(logits, labels)


class MaskedLMMixin:
    """Access to the decoder of `predictions`, whose weight is the word embedding matrix unless told otherwise."""

    _tied_weights_keys = {
        DECODER_WEIGHT: "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }

    def get_output_embeddings(self):
        return self.predictions.decoder

    def set_output_embeddings(self, new_embeddings):
        self.predictions.decoder = new_embeddings
        self.predictions.bias = new_embeddings.bias


@dataclass
class LeanAlbertForPreTrainingOutput(ModelOutput):
    """loss = mlm_loss + sop_loss, as far as labels are given; the two parts are detached, for metrics.

    prediction_logits: [batch, length, vocab_size]; with config.sparse_prediction and labels [num_labels, vocab_size],
    or None while training. sop_logits: [batch, 2].
    """

    loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    sop_loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    sop_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def separate_instances(instance_index):
    """Of packed rows: attention mask [batch, query, key], or on CPU `Spans`, which leave out what no instance sees;
    positions and first tokens (True), both [batch, length]."""
    if instance_index.device.type == "cpu" and not torch.compiler.is_compiling():
        attention_mask = Spans.of(instance_index)
    else:
        attention_mask = instance_index[:, :, None] == instance_index[:, None, :]
    is_first = (instance_index != F.pad(instance_index, (1, 0))[:, :-1]) & (instance_index > 0)
    columns = torch.arange(instance_index.shape[1], device=instance_index.device).expand_as(instance_index)
    begins = torch.where(is_first, columns, 0).cummax(dim=1).values
    return attention_mask, torch.where(instance_index > 0, columns - begins, 0), is_first


def find_first(labels, is_first):
    """Positions, in rows [batch, length] put end to end, of their first tokens, or of those that `is_first` marks."""
    if is_first is not None:
        return is_first.flatten().nonzero().squeeze(1)
    return torch.arange(0, labels.numel(), labels.shape[1], device=labels.device)


def pad_positions(first, labelled):
    """How many there are of both kinds and of padding, and all of them, a multiple of 64: oneDNN keeps code for every
    number of rows that it meets, for good."""
    padding = first.new_zeros(-(len(first) + len(labelled)) % 64)
    return [len(first), len(labelled), len(padding)], torch.cat([first, labelled, padding])


class LeanAlbertForPreTraining(MaskedLMMixin, LeanAlbertPreTrainedModel):
    """Masked-LM and sentence-order heads over the encoder."""

    def __init__(self, config):
        super().__init__(config)
        self.albert = LeanAlbertModel(config)
        self.predictions = MaskedLMHead(config)
        self.sop_classifier = SentenceOrderHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        sentence_order_label=None,
        instance_index=None,
        **kwargs,
    ):
        """labels: [batch, length], -100 where nothing is to be predicted; sentence_order_label: [batch], 1 = swapped,
        -100 = the row has no order loss. Other arguments: see `LeanAlbertModel.forward`.

        instance_index: [batch, length], for rows that hold several instances end to end: a number above zero for the
        tokens of each, another one than its neighbours', and 0 for padding. Instances do not see each other, positions
        begin anew in each, and sentence_order_label and sop_logits have one entry for each, row by row.
        """
        is_first = None
        if instance_index is not None:
            attention_mask, kwargs["position_ids"], is_first = separate_instances(instance_index)
        encode = partial(self.albert, input_ids, attention_mask, token_type_ids, **kwargs)
        if self._needs_few_positions(labels, kwargs):
            first, labelled = find_first(labels, is_first), find_labelled(labels)
            counts, wanted = pad_positions(first, labelled)
            outputs = encode(wanted=wanted)
            first_states, states, _ = outputs.last_hidden_state.split(counts)
            pooler_output = self.albert.pool(first_states)
            labels = labels.flatten().index_select(0, labelled)
            prediction_logits, mlm_loss = labelled_loss(self.predictions, states, labels)
        else:
            outputs = encode()
            states, pooler_output = outputs.last_hidden_state, outputs.pooler_output
            if is_first is not None:
                pooler_output = self.albert.pool(states[is_first])  # [instances, hidden_size]
            sparse = self.config.sparse_prediction
            prediction_logits, mlm_loss = masked_lm_loss(self.predictions, states, labels, sparse=sparse)
        sop_logits = self.sop_classifier(pooler_output)
        sop_loss = None
        if sentence_order_label is not None:
            sop_loss = mean_cross_entropy(sop_logits, sentence_order_label.flatten())
        losses = [loss for loss in (mlm_loss, sop_loss) if loss is not None]
        return LeanAlbertForPreTrainingOutput(
            loss=sum(losses) if losses else None,
            mlm_loss=None if mlm_loss is None else mlm_loss.detach(),
            sop_loss=None if sop_loss is None else sop_loss.detach(),
            prediction_logits=prediction_logits,
            sop_logits=sop_logits,
            hidden_states=outputs.hidden_states,
        )

    def _needs_few_positions(self, labels, options):
        """Whether the last layer's output is read at labels and first tokens only. A compiler would make code anew for
        every number of labels."""
        wants_all = options.get("output_hidden_states") or self.config.output_hidden_states
        return labels is not None and self.config.sparse_prediction and not (wants_all or torch.compiler.is_compiling())


class LeanAlbertForMaskedLM(MaskedLMMixin, LeanAlbertPreTrainedModel):
    """Masked-LM head over the encoder without its pooler."""

    _keys_to_ignore_on_load_unexpected = [r"^albert\.pooler\.", r"^sop_classifier\."]

    def __init__(self, config):
        super().__init__(config)
        self.albert = LeanAlbertModel(config, add_pooling_layer=False)
        self.predictions = MaskedLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        """labels: [batch, length], -100 where nothing is to be predicted. Others: see `LeanAlbertModel.forward`."""
        outputs = self.albert(input_ids, attention_mask, token_type_ids, **kwargs)
        logits, loss = masked_lm_loss(
            self.predictions, outputs.last_hidden_state, labels, sparse=self.config.sparse_prediction
        )
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class LeanAlbertForSequenceClassification(LeanAlbertPreTrainedModel):
    """Two-layer classifier over the first token of the encoder, which has no pooler here."""

    _keys_to_ignore_on_load_unexpected = [r"^albert\.pooler\.", r"^sop_classifier\.", r"^predictions\."]

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.albert = LeanAlbertModel(config, add_pooling_layer=False)
        self.classifier = nn.Sequential(
            nn.Dropout(config.classifier_dropout_prob),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.Tanh(),
            nn.Dropout(config.classifier_dropout_prob),
            nn.Linear(config.hidden_size, config.num_labels),
        )
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        """logits [batch, num_labels]; labels: [batch] classes or values, or [batch, num_labels] targets in [0, 1].

        The loss follows config.problem_type. Where that is None: mean squared error for one label, cross-entropy
        for integer labels, otherwise binary cross-entropy for each label.
        """
        outputs = self.albert(input_ids, attention_mask, token_type_ids, **kwargs)
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def _loss(self, logits, labels):
        problem_type = self.config.problem_type
        if problem_type is None:
            integer = not labels.is_floating_point()
            multiple = "single_label_classification" if integer else "multi_label_classification"
            problem_type = "regression" if self.num_labels == 1 else multiple
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if problem_type == "regression":
            return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
        if problem_type == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten())
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
