"""The verbs of `diptych batch`. cli.py adds them; what they do is agents/llm/batch_command.py's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

batch = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Function = Annotated[str, typer.Argument(metavar="FILE:FUNCTION", help="A typed call, or a prompt with --model.")]
Job = Annotated[str, typer.Argument(metavar="JOB", help="PREFIX/MODEL@ID, as `submit` and `list` print it.")]
Known = Annotated[
    str | None,
    typer.Argument(metavar="FILE:FUNCTION", help="Whose batch it is; needed where its registry knows the prefix."),
]
Poll = Annotated[
    float, typer.Option("--poll", min=0.01, max=86_400, help="Seconds between two questions; more often at first.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@batch.command("submit")
def batch_submit(
    target: Function,
    items: Annotated[
        str, typer.Argument(metavar="ITEMS", help="Lines of JSON: arguments by name, or the one argument; - for stdin.")
    ],
    id_member: Annotated[
        str | None, typer.Option("--id", metavar="NAME", help="The member of each line that is the item's id.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="PREFIX/MODEL that is asked instead.")] = None,
    window: Annotated[str, typer.Option(help="Within which it is answered; on own clusters any up to 7d.")] = "24h",
    state_file: Annotated[
        Path | None, typer.Option(help="Where the job is kept: the same command again goes on with it.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait, and print the results in place of the job.")] = False,
    poll_s: Poll = 10.0,
) -> None:
    """Call a function for each line of a file, as one batch, and print the job."""
    from diptych.agents.llm.batch_command import submit

    code = submit(
        target,
        items,
        id_member=id_member,
        model=model,
        window=window,
        state_file=state_file,
        poll_s=poll_s if wait else None,
    )
    raise typer.Exit(code)


@batch.command("status")
def batch_status(job: Job, target: Known = None, as_json: AsJson = False) -> None:
    """Say how far a batch is."""
    from diptych.agents.llm.batch_command import status

    raise typer.Exit(status(job, target, as_json=as_json))


@batch.command("wait")
def batch_wait(job: Job, target: Known = None, poll_s: Poll = 10.0) -> None:
    """Wait until a batch is over; progress goes to stderr."""
    from diptych.agents.llm.batch_command import wait

    raise typer.Exit(wait(job, target, poll_s=poll_s))


@batch.command("cancel")
def batch_cancel(job: Job, target: Known = None) -> None:
    """Stop a batch; what is answered already stays and can be had."""
    from diptych.agents.llm.batch_command import cancel

    raise typer.Exit(cancel(job, target))


@batch.command("results")
def batch_results(job: Job, target: Known = None) -> None:
    """Print a line of JSON for each item: its id, and its value or error. Without the function, values are texts."""
    from diptych.agents.llm.batch_command import results

    raise typer.Exit(results(job, target))


@batch.command("list")
def batch_list(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="The place that is asked.")] = "pool",
    target: Known = None,
    limit: Annotated[int, typer.Option(min=1, help="Most that are shown.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the batches of a place, the newest first."""
    from diptych.agents.llm.batch_command import listed

    raise typer.Exit(listed(prefix, target, limit=limit, as_json=as_json))
