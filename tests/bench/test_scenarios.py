"""What the benchmark's scenarios request."""

from types import SimpleNamespace

from bench.play import Answer, Request
from bench.scenarios import Load


class Stage:
    """Answers at once and records the requests."""

    def play(self, script):
        self.requests = script.requests
        return [Answer(0.0, 0.2, ((0.1, 0.2),), completion_tokens=2) for _ in script.requests]


def test_load_matches_its_title():
    """Clients, requests, lengths and sampling: greedy, or with the parameters in the title."""
    prompts = SimpleNamespace(request=lambda tokens, output: Request((), (1,) * tokens, output))
    for load, drawn, names_sampling in (
        (Load("load", 2, 3, 5, 7), (0.0, 1.0), False),
        (Load("sampled", 2, 3, 5, 7, temperature=0.7, top_p=0.95), (0.7, 0.95), True),
    ):
        stage = Stage()
        numbers = load.run(stage, prompts)

        assert numbers["tokens_per_second"] > 0
        assert names_sampling == ("temperature 0.7, top_p 0.95" in load.title)
        assert [(5, 7, *drawn)] * 6 == [
            (len(request.token_ids), request.output, request.temperature, request.top_p)
            for request in stage.requests
        ]
