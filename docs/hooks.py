"""Writes the reference of the commands from the recipes and their configurations."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from flowkit.__main__ import explained, recipes
from flowkit.rules import CONF

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
- `group=null` takes no choice, where the group allows it.

Each option shows its default, the values that it takes, and what it is. A wrong value ends in one
line and exit status 2, before any work:

| written | values |
| --- | --- |
| `int >= 1` | a whole number, with its range; `1e3` is no whole number |
| `0 <= float < 1` | a number, with its range |
| `bool` | `true` or `false` |
| `euclidean or inner`, `null` | one of these words |
| `text`, `path` | a text; a path that need not exist |
| `file`, `folder`, `run folder` | a path that exists; a run folder is written by `flowkit train` |
| `device` | a device of this machine |
| `part`, `settings` | a choice of a group, or a mapping with `_target_`; any mapping |
| `[int]`, `[float, float]`, `{text}` | a list, a list of two, a mapping of names |
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``commands.md`` to the pages."""
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def commands() -> str:
    """The page: a table of all recipes, the help of each, and the files of all choices."""
    known = recipes()
    table = ["| command | what it does |", "| --- | --- |"]
    table += [f"| [`flowkit {name}`](#flowkit-{name}) | {line} |" for name, line in known.items()]
    parts = [HEAD, "\n".join(table)]
    parts += [f"## flowkit {name}\n\n````text\n{explained(name)}\n````" for name in known]
    parts.append("## Choices\n\nThe options of every choice, with the values that they take.")
    for file in sorted(CONF.glob("*/*.yaml")):
        if file.parent.name != "experiment":
            name = f"{file.parent.name}={file.stem}"
            parts.append(f"### {name}\n\n````yaml\n{file.read_text().strip()}\n````")
    return "\n\n".join(parts) + "\n"
