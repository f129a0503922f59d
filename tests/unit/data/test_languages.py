"""Tests of the table of languages: which files, labels and scripts it recognises."""

from __future__ import annotations

from collections import Counter

import pytest

from peft_core.data.languages import (
    LANGUAGES,
    TEXT,
    is_known_label,
    language_named,
    language_of_file,
    language_of_script,
    language_of_text,
)


@pytest.mark.parametrize("words", ["extensions", "files", "names"])
def test_no_extension_file_name_or_alias_belongs_to_two_languages(words: str):
    def of(language):
        return (language.name, *language.aliases) if words == "names" else getattr(language, words)

    counts = Counter(word for language in LANGUAGES for word in of(language))
    assert [word for word, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("Token.sol", "solidity"), ("alu.sv", "verilog"), ("alu.v", "verilog"), ("Lib.fs", "fsharp"), ("list.ml", "ocaml"),
        ("mesh.f90", "fortran"), ("PAYROLL.CBL", "cobol"), ("stack.adb", "ada"), ("uart.vhd", "vhdl"),
        ("player.gd", "gdscript"),
        ("a.frag", "glsl"), ("a.hlsl", "hlsl"), ("a.wgsl", "wgsl"), ("a.metal", "metal"), ("flake.nix", "nix"),
        ("page.astro", "astro"), ("Index.cshtml", "razor"), ("show.html.erb", "erb"), ("app.hcl", "terraform"),
        ("dev.tfvars", "terraform"), ("defs.bzl", "starlark"), ("BUILD", "starlark"), ("BUILD.bazel", "starlark"),
        ("Vault.vy", "vyper"), ("Account.cls", "apex"), ("z.abap", "abap"), ("m.bas", "visualbasic"), ("a.asm", "assembly"),
        ("a.el", "emacs-lisp"), ("a.rkt", "racket"), ("a.cr", "crystal"), ("a.move", "move"), ("a.sas", "sas"),
        ("a.do", "stata"), ("a.tcl", "tcl"), ("Gemfile", "ruby"), ("a.fish", "fish"), ("a.R", "r"),
    ],
)  # fmt: skip
def test_a_file_is_recognised_by_its_name(name: str, language: str):
    found = language_of_file(name)
    assert found is not None
    assert found.name == language


@pytest.mark.parametrize(
    "name", ["build", "go.mod", "package.json", "values.yaml", "README", ".R", "notes.txt", "a.cson"]
)
def test_configuration_prose_and_unknown_names_are_no_code(name: str):
    assert language_of_file(name) is None


@pytest.mark.parametrize(
    ("label", "language"),
    [
        ("ir", "r"), ("julia-1.10", "julia"), ("SQL", "sql"), ("c#", "csharp"), ("bash", "shell"), ("python3", "python"),
        (".net-csharp", "csharp"), ("xcpp17", "cpp"), ("c++11", "cpp"), ("F#", "fsharp"), ("pwsh", "powershell"),
        ("scala212", "scala"), ("sv", "verilog"), ("hcl", "terraform"), ("proto", "protobuf"), ("octave", "matlab"),
    ],
)  # fmt: skip
def test_a_label_of_a_data_set_a_fence_or_a_kernel_names_its_language(label: str, language: str):
    assert is_known_label(label)
    assert language_named(label).name == language


@pytest.mark.parametrize("label", ["", "console", "output", "text", "json", "yaml", "1.0"])
def test_a_label_that_names_no_language_is_not_known(label: str):
    assert not is_known_label(label)
    assert language_named(label).name == (label or TEXT.name)


@pytest.mark.parametrize(
    ("line", "language"),
    [
        ("#!/usr/bin/env python3\n", "python"),
        ("#!/usr/bin/env -S deno run --allow-net\n", "typescript"),
        ("#!/usr/bin/env LANG=C perl -w\n", "perl"),
        ("#! /bin/sh -e\n", "shell"),
        ("#!/usr/local/bin/Rscript\n", "r"),
        ("#!/opt/own/thing\n", None),
        ("print('#!/bin/sh')\n", None),
    ],
)
def test_a_script_is_recognised_by_its_interpreter(line: str, language: str | None):
    found = language_of_script(line)
    assert (found and found.name) == language


@pytest.mark.parametrize(
    ("name", "text", "language"),
    [
        ("fit.m", "function y = fit(x)\n  y = x;\nend\n", "matlab"),
        ("View.m", '#import "View.h"\n\n@implementation View\n@end\n', "objective-c"),
        ("View.h", "#import <UIKit/UIKit.h>\n@interface View : UIView\n@end\n", "objective-c"),
        ("list.h", "#pragma once\nstruct list;\n", "cpp"),
        ("alu.v", "module alu\n  (input a, output b);\n  assign b = a;\nendmodule\n", "verilog"),
        ("main.v", "module main\n\nfn main() {\n\tprintln('a')\n}\n", "v"),
        ("nat.v", "Require Import Arith.\n\nLemma a : forall n, n = n.\nProof. auto. Qed.\n", "coq"),
        ("family.pl", "parent(tom, bob).\ngrand(X, Z) :- parent(X, Y), parent(Y, Z).\n", "prolog"),
        ("run.pl", "use strict;\nmy %h = (a => 1);\nprint $h{a};\n", "perl"),
        ("Lib.fs", "module Lib\n\nlet add a b = a + b\n", "fsharp"),
        ("light.fs", "#version 330 core\nvoid main() { }\n", "glsl"),
        ("Sheet1.cls", 'VERSION 1.0 CLASS\nAttribute VB_Name = "Sheet1"\n', "visualbasic"),
        ("Account.cls", "public with sharing class Account {\n}\n", "apex"),
        ("add.cl", "__kernel void add(__global int* a) {}\n", "opencl"),
        ("add.cl", "(defun add (a b) (+ a b))\n", "lisp"),
        ("app.pro", "QT += core gui\nSOURCES += main.cpp\n", "make"),
        ("app_de.ts", '<?xml version="1.0"?>\n<!DOCTYPE TS>\n<TS version="2.1" language="de">\n', None),
        ("app.ts", 'const page = "<!DOCTYPE html>";\n', "typescript"),
        ("thesis.cls", "\\NeedsTeXFormat{LaTeX2e}\n\\ProvidesClass{thesis}\n", None),
    ],
)
def test_a_file_whose_extension_is_shared_is_recognised_by_its_text(name: str, text: str, language: str | None):
    by_name = language_of_file(name)
    assert by_name is not None
    found = language_of_text(name, text, by_name)
    assert (found and found.name) == language


def test_hostile_text_is_recognised_in_linear_time():
    for name in ("a.m", "a.v", "a.pl", "a.pp", "a.cl", "a.pro"):
        by_name = language_of_file(name)
        assert by_name is not None
        for text in ("\n" * 20_000, " " * 20_000, "a(" * 10_000, "a()" * 7_000, "module a" * 3_000):
            assert language_of_text(name, text, by_name) is not None
