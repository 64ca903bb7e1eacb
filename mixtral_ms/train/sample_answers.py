"""Greedy answers of the network in training to a few prompts, before and after, for the report.

Legend: N prompts, S sequence, V vocabulary.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from mixtral_ms.config import RunConfig
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.config.sections.training_section import SampleMonitorSection
from mixtral_ms.data.loader.record_loader import RecordLoader
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.process_groups import gather_objects
from mixtral_ms.train.evaluation import dropless
from mixtral_ms.train.report.report import SAMPLES_FILE, read_samples


class Samples:
    """Asks the network the same before and after training, and keeps the answers in output_dir.

    All ranks ask together; the first one writes.

    Args:
        config: the run.
        section: how many prompts, how long the answers.
        network: whose current weights answer.
        loader: records; what stands before the first supervised token of one is a prompt.

    Raises:
        UserError: there is no tokenizer, or no record has a prompt.
    """

    def __init__(
        self,
        config: RunConfig,
        section: SampleMonitorSection,
        network: MixtralForCausalLM,
        loader: RecordLoader,
    ) -> None:
        file = config.processor.tokenizer.vocab_file
        if not file:
            raise UserError(
                "the callback SampleMonitor shows text, but processor.tokenizer.vocab_file is "
                "empty: set --vocab_file to the tokenizer.model"
            )
        self.tokenizer, self.mesh = Tokenizer(file), network.mesh
        self.path = Path(config.output_dir) / SAMPLES_FILE
        self.most, self.eos = section.max_new_tokens, network.config.eos_token_ids
        pairs = _prompts_and_answers(
            loader, section.rows, network.config.seq_length - self.most, network.config
        )
        self.prompts, self.answers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.next_token = NextToken(network, len(pairs))

    def before(self) -> None:
        """Ask before the first step; a run that is taken up again has done so."""
        if gather_objects(self.mesh.world, self.path.is_file())[0]:
            self._kept()
            return
        texts = [self._decode(ids) for ids in self.prompts]
        expected = [self._decode(ids[: self.most]) for ids in self.answers]
        columns = zip(texts, expected, self._generate(), strict=True)
        keys = ("prompt", "expected", "before")
        self._write([dict(zip(keys, texts, strict=True)) for texts in columns])

    def after(self) -> None:
        """Ask again, with the weights as they are now."""
        answers = self._generate()
        if self.mesh.rank == 0:
            self._write(
                [{**one, "after": text} for one, text in zip(self._kept(), answers, strict=True)]
            )

    def _kept(self) -> list[dict[str, str]]:
        """What was answered before the first step; UserError where it is of other prompts."""
        if self.mesh.rank:
            return []
        kept = read_samples(self.path.parent)
        if [one.get("prompt") for one in kept] != [self._decode(ids) for ids in self.prompts]:
            raise UserError(
                f"{self.path}: holds answers to other prompts than this run's callback "
                "SampleMonitor asks: move it away"
            )
        return kept

    def _generate(self) -> list[str]:
        """Greedy answers, every token by a pass over the whole sequence."""
        ids_NS = np.zeros((len(self.prompts), self.next_token.seq_length), np.int32)
        ends = [len(prompt) for prompt in self.prompts]
        for number, prompt in enumerate(self.prompts):
            ids_NS[number, : ends[number]] = prompt
        done = [False] * len(ends)
        for _ in range(self.most):
            last_N = Tensor(np.array(ends, np.int32) - 1)
            for number, token in enumerate(self.next_token(Tensor(ids_NS), last_N).asnumpy()):
                done[number] = done[number] or token in self.eos
                if not done[number]:
                    ids_NS[number, ends[number]] = token
                    ends[number] += 1
            if all(done):
                break
        spans = zip(ids_NS, self.prompts, ends, strict=True)
        return [self._decode(ids[len(prompt) : end]) for ids, prompt, end in spans]

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(one) for one in ids])

    def _write(self, samples: list[dict[str, str]]) -> None:
        if self.mesh.rank:
            return
        with write_aside(self.path) as aside:
            aside.write_text(json.dumps(samples, ensure_ascii=False, indent=1), encoding="utf-8")


def _prompts_and_answers(
    loader: RecordLoader, count: int, longest: int, config: MixtralConfig
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompt and supervised answer of the first records that have both."""
    found = []
    for batch in loader.batches(0):
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            supervised = np.flatnonzero(labels != config.ignore_token_id)
            # labels are the next ids: the prompt ends where the first supervised id is next
            if len(supervised) and 0 < supervised[0] < longest:
                begin = supervised[0] + 1
                gaps = np.flatnonzero(np.diff(supervised) > 1)
                end = supervised[gaps[0]] if len(gaps) else supervised[-1]
                found.append((ids[:begin], labels[supervised[0] : end + 1]))
            if len(found) == count:
                return found
    if not found:
        raise UserError(
            "the callback SampleMonitor found no record with a prompt: its data has no labels, or "
            "every prompt is too long for seq_length"
        )
    get_logger().info("SampleMonitor.rows is %d, and %d records have a prompt", count, len(found))
    return found


class NextToken(nn.Cell):
    """The likeliest id after position `last` of every sequence.

    Args:
        network: whose current weights answer.
        rows: N.
    """

    def __init__(self, network: MixtralForCausalLM, sequences: int) -> None:
        super().__init__(auto_prefix=False)
        self.network = MixtralForCausalLM(
            dropless(network.config), batch_size=sequences, share=network, mesh=network.mesh
        )
        self.seq_length = network.config.seq_length
        self.set_train(False)

    def construct(self, ids_NS: Tensor, last_N: Tensor) -> Tensor:
        """Returns (N)."""
        hidden_NSD = self.network.model(ids_NS)[0]
        first_N = ops.arange(0, hidden_NSD.shape[0], 1, dtype=last_N.dtype) * hidden_NSD.shape[1]
        flat = ops.reshape(hidden_NSD, (-1, hidden_NSD.shape[2]))
        return ops.argmax(self.network.logits(ops.gather(flat, first_N + last_N, 0)), -1)
