"""What the answers of an endpoint may cost."""

from __future__ import annotations

import threading

from slmops.errors import ConfigError, UserError


class BudgetExceeded(UserError):
    """The budget is used up and questions are left. What was answered is kept in the cache."""


class Budget:
    """Tokens and money that may be spent in this process, by all teachers that share it; any thread may use it.

    It is looked at before a request starts and counts what comes back, so it is exceeded by what was on its way when it
    was used up: at most `max_in_flight` answers. Requests that broke off count nothing, as nobody says what they cost.
    """

    def __init__(
        self,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
    ) -> None:
        """
        Args:
            max_tokens: Of prompts and answers together; None for any number.
            max_cost: In the currency of the prices; None for any.
            prompt_price: Of a million prompt tokens.
            completion_price: Of a million answer tokens.

        Raises:
            ConfigError: `max_cost` without a price would never be reached.
        """
        if max_cost is not None and prompt_price == completion_price == 0:
            raise ConfigError(f"max_cost {max_cost:g} needs prices; set what a million tokens cost, or max_tokens")
        self.max_tokens, self.max_cost = max_tokens, max_cost
        self.prompt_price, self.completion_price = prompt_price, completion_price
        self.num_prompt_tokens = self.num_tokens = 0
        self._lock = threading.Lock()

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self.max_tokens is not None or self.max_cost is not None

    @property
    def cost(self) -> float:
        """What was spent."""
        return (self.num_prompt_tokens * self.prompt_price + self.num_tokens * self.completion_price) / 1e6

    def spend(self, num_prompt_tokens: int, num_tokens: int) -> None:
        """Count the tokens of a prompt and its answer."""
        with self._lock:
            self.num_prompt_tokens += num_prompt_tokens
            self.num_tokens += num_tokens

    def left(self) -> bool:
        """Whether another request may start."""
        with self._lock:
            spent = self.num_prompt_tokens + self.num_tokens
            return (self.max_tokens is None or spent < self.max_tokens) and (
                self.max_cost is None or self.cost < self.max_cost
            )

    def exceeded(self) -> BudgetExceeded:
        """The error for questions that are left when it is used up."""
        spent = f"{self.num_prompt_tokens + self.num_tokens:,} tokens"
        limit = f"max_tokens {self.max_tokens:,}" if self.max_tokens is not None else ""
        if self.max_cost is not None:
            spent += f", cost {self.cost:.2f}"
            limit = ", ".join(filter(None, (limit, f"max_cost {self.max_cost:g}")))
        return BudgetExceeded(
            f"the teacher's budget is used up ({spent} of {limit}) and questions are left; raise it and run the same "
            "command again: answers that came are kept and not paid for twice"
        )
