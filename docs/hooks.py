"""Writes the reference of the commands from the recipes and their configurations."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from flowkit.__main__ import explained, recipes

HEAD = """# Commands

Every command is `flowkit <recipe> option=value ...`. `flowkit` alone lists the recipes, and
`flowkit <recipe> --help` prints what stands below. This page is made from the recipes and their
configurations whenever the documentation is built.

- A *choice* picks one file of a group: `model=dit`. Options of the chosen part follow with a dot:
  `model.width=256`.
- `flowkit <recipe> --cfg job` prints the whole configuration with all choices filled in.
- A list is written without spaces, `labels=[3,8]`. Quote it where your shell reads brackets.
- A new key needs a plus sign: `+trainer.limit_val_batches=8`.
- Your own files of choices come in with `--config-dir <folder>`.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``commands.md`` to the pages."""
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def commands() -> str:
    """The page: a table of all recipes, and the help of each."""
    known = recipes()
    table = ["| command | what it does |", "| --- | --- |"]
    table += [f"| [`flowkit {name}`](#flowkit-{name}) | {line} |" for name, line in known.items()]
    parts = [HEAD, "\n".join(table)]
    parts += [f"## flowkit {name}\n\n````text\n{explained(name)}\n````" for name in known]
    return "\n\n".join(parts) + "\n"
