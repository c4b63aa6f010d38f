"""What a progress display shows, on a terminal and elsewhere."""

import io

from jaxguard.utils import progress as module
from jaxguard.utils.progress import PLAIN_SECONDS, Progress, track
from jaxguard.utils.terminal import Console


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def plain_console():
    return Console(file=io.StringIO(), width=80)


def lines(console):
    return console.file.getvalue().splitlines()


def test_plain_lines_have_no_control_codes_and_come_seldom():
    clock, console = Clock(), plain_console()
    with Progress("traces", 100, console=console, clock=clock) as progress:
        for done in range(1, 101):
            clock.now += 1.0
            progress.update(done, f"failed: {done}", tokens=done * 50)
        progress.say("left [not markup]")
    assert len(lines(console)) == 100 // PLAIN_SECONDS + 1 + 1
    assert lines(console)[0] == "traces 30/100  failed: 30  1.0 examples/s  50 tokens/s  ETA 0:01:10"
    assert lines(console)[-2].startswith("traces 100/100")
    assert lines(console)[-1] == "left [not markup]"
    assert "\x1b" not in console.file.getvalue()


def test_time_left_does_not_count_what_came_before_the_first_result():
    clock, console = Clock(), plain_console()
    with Progress("tiny", 1000, 990, console, clock=clock) as progress:
        clock.now += 100
        progress.update(991)
        assert lines(console)[-1].endswith("ETA -:--:--")
        clock.now += 20
        progress.update(992)
        clock.now += 20
        progress.update(993)
    assert lines(console)[-1].endswith("ETA 0:02:20")


def test_results_of_one_batch_have_no_speed_and_those_of_two_have_that_between_them():
    clock, console = Clock(), plain_console()
    with Progress("guard", 8, console=console, clock=clock) as progress:
        for batch in range(2):
            clock.now += 40
            for row in range(1, 5):
                clock.now += 1e-4
                progress.update(4 * batch + row, tokens=100)
    assert lines(console) == [
        "guard 1/8  2 tokens/s  ETA -:--:--",
        "guard 5/8  0.1 examples/s  1 tokens/s  ETA 0:00:30",
        "guard 8/8  0.2 examples/s  1 tokens/s  ETA 0:00:00",
    ]


def test_time_left_does_not_count_what_is_skipped():
    """As when the second step has another shape than the first, and is compiled too."""
    clock, console = Clock(), plain_console()
    with Progress("tiny", 100, 0, console, unit=None, clock=clock) as progress:
        for done, compiling in ((1, 600), (2, 300), (3, 0), (4, 0)):
            clock.now += compiling
            if compiling:
                progress.skip()
            clock.now += 30
            progress.update(done)
    assert [line.split()[-1] for line in lines(console)] == ["-:--:--", "0:49:00", "0:48:30", "0:48:00"]


def test_a_bar_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress("tiny", 4, 1, console, unit=None) as progress:
        progress.update(3, "loss [red]")
        progress.advance("loss 0.1250")
        progress.say("above [the] bar")
    text = console.file.getvalue()
    assert all(part in text for part in ("4/4", "loss 0.1250", "above [the] bar"))
    assert "/s" not in text


def test_only_long_loops_are_tracked(capsys, monkeypatch):
    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.0)
    assert list(track(range(5), "encoding")) == list(range(5))
    assert capsys.readouterr() == ("", "")
    assert list(track(range(5), "encoding", least=5)) == list(range(5))
    output = capsys.readouterr()
    assert (output.out, "encoding 5/5" in output.err) == ("", True)
