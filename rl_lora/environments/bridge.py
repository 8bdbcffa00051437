"""The token ids between two turns of the policy: what a chat template writes around an observation.

What was sampled is never decoded and encoded again, as other ids could result ("ab" may be one
token, and have been sampled as two): the next turn's prompt is the prompt, the completion's ids and
these ids. They are the difference that the observation makes to a rendered conversation, which is
the same whatever the turns before say. (Templates that drop the thinking of earlier turns would
show the policy another text than it has sampled; here it sees what it has sampled.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rl_lora.data.chat_template import ChatTemplate, check_characters, encode_prompts
from rl_lora.data.messages import Message
from rl_lora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "What is 4 + 3?", "this was the turn before"
_WHO = "an observation of the environment"


class Bridge:
    """From the end of one turn to the begin of the next.

    Args:
        tokenizer: of the base model.
        template: "chat", or "base": the observation is a line of plain text.
        kwargs: `data.chat_template_kwargs`.
        role: of the message that the observation is.

    Raises:
        UserError: the template cannot render an observation after a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "chat",
        kwargs: Mapping[str, Any] | None = None,
        role: str = "user",
    ) -> None:
        self._tokenizer, self._role = tokenizer, role
        self._chat = ChatTemplate(tokenizer, kwargs or {}) if template == "chat" else None
        self._end_id: int | None = None
        special = [one.content for one in tokenizer.added_tokens_decoder.values() if one.special]
        self._marks = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        if self._chat is not None:
            end = self._chat.turn_end
            if end is None:
                raise UserError(
                    "environment: the model's chat template writes no token that ends a turn, so "
                    "there is no place for an observation; set data.template='base', or another "
                    "template as data.chat_template_kwargs.chat_template"
                )
            self._end_id = end.token_id
        self.token_ids("7", None)

    def token_ids(self, observation: str, last_id: int | None) -> tuple[int, ...]:
        """The ids between a turn that ends with `last_id` and the next one.

        Special tokens within the observation become blanks: they could end a turn or start one.
        """
        check_characters(observation, _WHO)
        text = self._marks.sub(" ", observation)
        if self._chat is None:
            return self._encoded(f"\n{text}\n")
        turns = [
            Message("user", _QUESTION),
            Message("assistant", _ANSWER),
            Message(self._role, text),
        ]
        rendered = self._chat.render(turns, _WHO, opens_turn=True)
        _, _, after = rendered.partition(_ANSWER)
        ids = self._encoded(after)
        if self._end_id not in ids:
            raise UserError(
                f"environment: the model's chat template does not end a turn before {_WHO} "
                f"(environment.role={self._role!r}); set another role, or another template as "
                "data.chat_template_kwargs.chat_template"
            )
        start = ids.index(self._end_id)  # before it may be blanks that the template writes
        return ids[start + (last_id == self._end_id) :]

    def _encoded(self, text: str) -> tuple[int, ...]:
        (ids,) = encode_prompts([text], self._tokenizer, with_start=False)
        return tuple(ids)
