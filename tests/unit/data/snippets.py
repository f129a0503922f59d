"""A snippet of each language that is cut at its syntax tree, with some of the units that a person would choose."""

SNIPPETS = {
    "python": """# Copyright 2024 Someone

import os


def small(): return 1


@decorated
# about the class
class Shape(Base):
    \"\"\"A shape.\"\"\"

    sides = 4

    # about area
    @property
    def area(self):
        return self.width * self.height

    class Inner:
        def deep(self):
            return "ünï\\n"

async def load(path):
    async with open_file(path) as stream:
        return await stream.read()
""",
    "javascript": """const React = require("react");
/** Says hello. */
export function App({ name }) {
  return <div>{name}</div>;
}
exports.run = async function () { return 1; };
class Foo {
  bar() { return 2; }
  baz = () => 2;
}
""",
    "typescript": """import { A } from "./a";
@Injectable()
export class Store<T> extends Base {
  private items: T[] = [];
  @Input()
  add(item: T): void { this.items.push(item); }
  remove = (item: T) => { this.items = []; };
}
export interface Options { a: string; b?: number }
namespace Inner { export function f() { return 1; } }
""",
    "go": """package main
import "fmt"
// Point is a point.
type Point struct {
	X, Y int
}
// Add adds.
func (p *Point) Add(q Point) Point { return Point{p.X + q.X, p.Y + q.Y} }
func main() { fmt.Println("ünï") }
""",
    "rust": """//! Crate.
use std::fmt;
/// A point.
#[derive(Debug)]
pub struct Point { x: i32 }
impl Point {
    /// Makes one.
    #[inline]
    pub fn new(x: i32) -> Self { Point { x } }
    pub fn double(&self) -> i32 { self.x * 2 }
}
mod tests { fn it_works() { assert!(true); } }
""",
    "java": """package a.b;
import java.util.List;
/** Doc. */
@Deprecated
public class D extends Base {
    private int x = 1;
    public D(int x) { this.x = x; }
    /** Adds. */
    @Override
    public int add(int y) { return x + y; }
    enum Colour { RED, GREEN; int f() { return 1; } }
}
""",
    "c": """#include <stdio.h>
typedef struct point {
    int x, y;
} point_t;
#ifdef DEBUG
static void debug(const char *s) { fprintf(stderr, "%s", s); }
#endif
/* Adds. */
int add(int a, int b)
{
    return a + b;
}
""",
    "cpp": """#ifndef F_HPP
#define F_HPP
namespace geo {
/// A shape.
template <typename T>
class Shape : public Base {
public:
    explicit Shape(T t) : t_(t) {}
    virtual double area() const { return t_.area() * 2.0; }
private:
    T t_;
};
inline int twice(int n) { return n * 2; }
}  // namespace geo
#endif
""",
    "csharp": """using System;
namespace Shop.Orders
{
    /// <summary>An order.</summary>
    [Serializable]
    public class Order : IEntity
    {
        private readonly List<Line> _lines = new();
        public decimal Total { get { return _lines.Sum(l => l.Price); } }
        public Order(int id) { Id = id; }
        // Adds a line.
        [Obsolete("use Append")]
        public void Add(Line line)
        {
            _lines.Add(line);
        }
        public static Order operator +(Order a, Line b) => a.With(b);
    }
    public interface IStore { Task SaveAsync(Order order); }
    public record Line(string Sku, decimal Price);
    public enum Status { Open, Paid, Shipped }
}
""",
    "kotlin": """package shop.cart

import kotlin.math.max

/** A cart. */
@Serializable
data class Cart(val id: Int, val lines: List<Line> = emptyList()) : Entity {
    val total: Double get() = lines.sumOf { it.price }

    // Adds a line.
    @Throws(IOException::class)
    fun add(line: Line): Cart {
        return copy(lines = lines + line)
    }

    companion object {
        fun empty() = Cart(0)
    }
}

object Registry {
    val all = mutableMapOf<Int, Cart>()
}

interface Store {
    suspend fun save(cart: Cart)
}

// Formats a price.
fun Double.asPrice(): String = "%.2f".format(this)
""",
    "swift": """import Foundation

/// A point.
@available(iOS 13, *)
public struct Point: Equatable {
    let x: Double
    let y: Double

    init(x: Double, y: Double) { self.x = x; self.y = y }

    /// The distance to another point.
    func distance(to other: Point) -> Double {
        return hypot(x - other.x, y - other.y)
    }
}

extension Point: CustomStringConvertible {
    var description: String { "(\\(x), \\(y))" }
}

protocol Shape { func area() -> Double }

enum Side: String { case left, right }

// Greets.
func greet(_ name: String) -> String { "Hello \\(name)" }
""",
    "scala": """package shop

import scala.util.Try

/** A cart. */
@deprecated
case class Cart(id: Int, lines: List[Line]) extends Entity {
  val total: Double = lines.map(_.price).sum

  // Adds a line.
  def add(line: Line): Cart = {
    copy(lines = line :: lines)
  }
}

object Cart {
  def empty: Cart = Cart(0, Nil)
}

trait Store { def save(cart: Cart): Try[Unit] }

// Formats a price.
def format(price: Double): String = f"$price%.2f"
""",
    "dart": """import 'package:flutter/material.dart';

/// A counter.
@immutable
class Counter extends StatefulWidget {
  const Counter({super.key, required this.start});

  final int start;

  /// Creates the state.
  @override
  State<Counter> createState() => _CounterState();

  static int twice(int n) {
    return n * 2;
  }
}

mixin Logging { void log(String text) { print(text); } }

enum Side { left, right }

extension Names on String { String get title => toUpperCase(); }

// Starts the app.
void main() {
  runApp(const Counter(start: 0));
}
""",
    "groovy": """plugins { id 'java' }

/** A cart. */
class Cart {
    List lines = []

    // Adds a line.
    def add(line) {
        lines << line
    }
}

def twice(int n) {
    return n * 2
}

dependencies {
    implementation 'a:b:1.0'
}
""",
    "objective-c": """#import "View.h"

@protocol Drawing
- (void)draw;
@end

/// A view.
@interface View : UIView <Drawing>
@property (nonatomic) CGFloat width;
- (instancetype)initWithWidth:(CGFloat)width;
@end

@implementation View

- (instancetype)initWithWidth:(CGFloat)width {
  self = [super init];
  return self;
}

// Draws.
- (void)draw {
  NSLog(@"%f", self.width);
}

@end

static int twice(int n) { return n * 2; }
""",
    "php": """<?php
namespace App\\Models;

use Illuminate\\Support\\Str;

/** A user. */
#[Entity]
final class User extends Model implements HasName
{
    private string $name = '';

    public function __construct(private int $id) {}

    /** Returns the name. */
    public function name(): string
    {
        return Str::title($this->name);
    }
}

interface HasName { public function name(): string; }

trait Sluggable { public function slug() { return Str::slug($this->name()); } }

// Adds two numbers.
function add(int $a, int $b): int
{
    return $a + $b;
}
""",
    "ruby": """require "set"

module Billing
  # An invoice.
  class Invoice < Base
    attr_reader :lines

    def initialize(lines)
      @lines = lines
    end

    # The sum of all lines.
    def total
      lines.sum(&:price)
    end

    def self.parse(text)
      new(text.split("\\n"))
    end

    private

    def tax = total * 0.2
  end
end

def main
  puts Billing::Invoice.parse(ARGF.read).total
end
""",
    "shell": """#!/usr/bin/env bash
set -euo pipefail

# Prints a message.
log() {
  printf '%s\\n' "$*" >&2
}

# Removes the build.
function clean {
  rm -rf "${BUILD_DIR:?}"
  log "cleaned"
}

if [[ "${1:-}" == "clean" ]]; then
  clean
else
  log "usage: $0 clean"
fi
""",
    "powershell": """param([string]$Name)

<# .SYNOPSIS Greets. #>
function Get-Greeting {
    [CmdletBinding()]
    param([string]$Who)
    return "Hello $Who"
}

# A cart.
class Cart {
    [int] $Id
    Cart([int]$id) { $this.Id = $id }
    [int] Twice() {
        return $this.Id * 2
    }
}

Get-Greeting -Who $Name
""",
    "lua": """local M = {}

--- Adds two numbers.
-- @param a number
local function add(a, b)
  return a + b
end

-- A stack.
function M.push(stack, value)
  stack[#stack + 1] = value
end

function M:pop()
  return table.remove(self)
end

M.map = function(list, f)
  local out = {}
  for i, v in ipairs(list) do out[i] = f(v) end
  return out
end

return M
""",
    "julia": """module Geometry

using LinearAlgebra
export Point, area

"A point in the plane."
struct Point{T<:Real}
    x::T
    y::T
end

abstract type Shape end

# Adds two points.
Base.:+(a::Point, b::Point) = Point(a.x + b.x, a.y + b.y)

\"\"\"
    area(points)

The area of a polygon.
\"\"\"
function area(points::Vector{Point})
    total = 0.0
    for (p, q) in zip(points, circshift(points, -1))
        total += p.x * q.y - p.y * q.x
    end
    return abs(total) / 2
end

macro twice(ex)
    :($ex; $ex)
end

end
""",
    "haskell": """{-# LANGUAGE OverloadedStrings #-}
module Shop.Cart (Cart (..), total) where

import qualified Data.Map as Map

-- | A cart.
data Cart = Cart
  { cartId :: Int
  , cartLines :: [Double]
  } deriving (Show, Eq)

class Priced a where
  price :: a -> Double

instance Priced Cart where
  price = total

-- | The sum of all lines.
total :: Cart -> Double
total (Cart _ []) = 0
total (Cart i (x : xs)) = x + total (Cart i xs)

main :: IO ()
main = print (total (Cart 1 [1, 2]))
""",
    "ocaml": """open Printf

(** A point. *)
type point = { x : float; y : float }

module Stack = struct
  type 'a t = 'a list
  let push x s = x :: s
end

(* Adds two points. *)
let add a b = { x = a.x +. b.x; y = a.y +. b.y }

let rec length = function
  | [] -> 0
  | _ :: t -> 1 + length t
""",
    "elixir": """defmodule Shop.Cart do
  @moduledoc "A cart."
  use GenServer
  alias Shop.Line

  defstruct id: 0, lines: []

  # Adds a line.
  @doc "Adds a line to a cart."
  @spec add(t, Line.t()) :: t
  def add(%__MODULE__{} = cart, line) do
    %{cart | lines: [line | cart.lines]}
  end

  defp total(lines), do: Enum.sum(lines)

  defmacro trace(expr) do
    quote do: IO.inspect(unquote(expr))
  end
end

defimpl String.Chars, for: Shop.Cart do
  def to_string(cart), do: "cart #{cart.id}"
end
""",
    "zig": """const std = @import("std");

/// A point.
pub const Point = struct {
    x: f32,
    y: f32,

    /// Adds two points.
    pub fn add(self: Point, other: Point) Point {
        return .{ .x = self.x + other.x, .y = self.y + other.y };
    }
};

const Side = enum { left, right };

// Doubles.
pub fn twice(n: u32) u32 {
    return n * 2;
}

test "twice" {
    try std.testing.expectEqual(twice(2), 4);
}
""",
    "fortran": """! Geometry.
module geometry
  implicit none
  type :: point
    real :: x, y
  end type point
contains
  ! Adds.
  function add(a, b) result(c)
    type(point), intent(in) :: a, b
    type(point) :: c
    c%x = a%x + b%x
  end function add

  subroutine show(p)
    type(point), intent(in) :: p
    print *, p%x
  end subroutine show
end module geometry

program main
  use geometry
  print *, 1
end program main
""",
    "solidity": """// SPDX-License-Identifier: MIT
pragma solidity ^0.8.20;

import "./IERC20.sol";

/// @title A token.
contract Token is IERC20, Ownable {
    mapping(address => uint256) private _balances;
    event Minted(address to, uint256 amount);

    modifier onlyMinter() { require(msg.sender == minter, "no"); _; }

    constructor(address owner) { _owner = owner; }

    /// @notice Transfers tokens.
    function transfer(address to, uint256 amount) external override returns (bool) {
        _balances[msg.sender] -= amount;
        _balances[to] += amount;
        return true;
    }

    receive() external payable {}
}

interface IVault { function deposit(uint256 amount) external; }

library Math { function max(uint a, uint b) internal pure returns (uint) { return a > b ? a : b; } }
""",
    "verilog": """`timescale 1ns/1ps
`include "defs.svh"

package types_pkg;
  typedef enum logic [1:0] { IDLE, RUN } state_t;
  function automatic int add(int a, int b);
    return a + b;
  endfunction
endpackage

// A counter.
module counter #(parameter WIDTH = 8) (
  input  logic clk, rst,
  output logic [WIDTH-1:0] q
);
  always_ff @(posedge clk) begin
    if (rst) q <= '0;
    else q <= q + 1;
  end

  // Doubles.
  function automatic logic [7:0] twice(input logic [7:0] n);
    return n << 1;
  endfunction

  task wait_for(input int n);
    repeat (n) @(posedge clk);
  endtask
endmodule

interface bus_if(input logic clk);
  logic valid;
endinterface

class Packet extends Base;
  rand bit [7:0] data;
  function new(); data = 0; endfunction
endclass
""",
    "vhdl": """library ieee;
use ieee.std_logic_1164.all;

-- A counter.
entity counter is
  port (clk : in std_logic; q : out std_logic);
end entity;

architecture rtl of counter is
begin
  process (clk)
  begin
    if rising_edge(clk) then
      q <= not q;
    end if;
  end process;
end architecture;
""",
    "gdscript": """extends Node2D
class_name Player

signal died(reason)
@export var speed: float = 200.0

# Moves the player.
func _process(delta: float) -> void:
	position.x += speed * delta

class Inner:
	var x = 1
	func f():
		return x
""",
    "glsl": """#version 330 core
in vec3 normal;
out vec4 colour;

struct Light { vec3 position; float power; };

// The light of a point.
float lambert(vec3 n, vec3 l) {
  return max(dot(n, l), 0.0);
}

void main() {
  colour = vec4(lambert(normal, vec3(1.0)));
}
""",
    "sql": """-- All customers.
CREATE TABLE customers (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL
);

CREATE INDEX customers_by_name ON customers (name);

-- The latest orders.
CREATE VIEW latest_orders AS
SELECT o.id, c.name FROM orders o JOIN customers c ON c.id = o.customer_id
ORDER BY o.created DESC;

CREATE OR REPLACE FUNCTION add_one(a integer) RETURNS integer AS $$
BEGIN
  RETURN a + 1;
END;
$$ LANGUAGE plpgsql;

SELECT count(*) FROM customers WHERE name LIKE 'A%';
INSERT INTO customers (id, name) VALUES (1, 'Ann');
""",
    "terraform": """terraform {
  required_version = ">= 1.5"
}

# The bucket.
resource "aws_s3_bucket" "logs" {
  bucket = "logs-${var.env}"
  tags = {
    Name = "logs"
  }
}

variable "env" {
  type    = string
  default = "dev"
}

locals { name = "shop-${var.env}" }
""",
    "css": """@import url("base.css");
:root { --accent: #c00; }

/* The cart. */
.cart > li {
  color: var(--accent);
}

@media (max-width: 600px) {
  .cart { display: none; }
  .menu { display: block; }
}

@keyframes spin { from { rotate: 0; } to { rotate: 360deg; } }
""",
    "scss": """@use "colours";
$accent: #c00;

// Rounds the corners.
@mixin rounded($radius: 4px) {
  border-radius: $radius;
}

@function double($n) { @return $n * 2; }

.cart {
  @include rounded;
  li { color: $accent; &:hover { color: darken($accent, 10%); } }
}
""",
    "html": """<!DOCTYPE html>
<html>
<head>
  <title>Shop</title>
  <style>
    body { margin: 0; }
    .cart { color: red; }
  </style>
</head>
<body>
  <!-- The cart. -->
  <main id="cart"><ul><li>One</li></ul></main>
  <script>
    const total = (lines) => lines.length;
    function render(lines) {
      document.title = total(lines);
    }
  </script>
</body>
</html>
""",
    "vue": """<template>
  <div class="cart">
    <li v-for="line in lines" :key="line.id" @click="add(line)">{{ line.name }}</li>
  </div>
</template>

<script setup lang="ts">
import { ref } from 'vue'

const lines = ref<Line[]>([])

// Adds a line.
function add(line: Line): void {
  lines.value.push(line)
}

function total(): number {
  return lines.value.reduce((sum, line) => sum + line.price, 0)
}
</script>

<style scoped lang="scss">
.cart { li { color: red; } }
</style>
""",
    "svelte": """<script>
  export let name = 'world';

  // Greets.
  function greet(who) {
    return `Hello ${who}`;
  }
</script>

<main>
  {#if name}
    <h1>{greet(name)}</h1>
  {:else}
    <p>nobody</p>
  {/if}
</main>

<style>
  h1 { color: purple; }
</style>
""",
}

EXPECTED = {  # (kind, beginning of the body) of some units
    "python": [("function", "async def load")],
    "javascript": [("function", "/** Says hello"), ("class", "class Foo")],
    "typescript": [("class", "@Injectable()\nexport class"), ("module", "namespace Inner")],
    "go": [("class", "// Point is"), ("method", "// Add adds"), ("function", "func main")],
    "rust": [("class", "/// A point.\n#[derive"), ("class", "impl Point")],
    "java": [("class", "/** Doc. */\n@Deprecated"), ("method", "    /** Adds. */\n    @Override")],
    "c": [("class", "typedef struct"), ("function", "/* Adds. */")],
    "cpp": [("class", "/// A shape.\ntemplate"), ("function", "inline int twice")],
    "csharp": [("class", "    /// <summary>An order"), ("method", "        // Adds a line.\n        [Obsolete")],
    "kotlin": [("class", "/** A cart. */\n@Serializable"), ("method", "    // Adds a line."), ("function", "// Formats")],
    "swift": [("class", "/// A point.\n@available"), ("method", "    /// The distance"), ("class", "extension Point")],
    "scala": [("class", "/** A cart. */\n@deprecated"), ("method", "  // Adds a line."), ("class", "object Cart")],
    "dart": [("class", "/// A counter.\n@immutable"), ("method", "  /// Creates the state.\n  @override"), ("function", "//")],
    "groovy": [("class", "/** A cart. */\nclass"), ("method", "    def add"), ("function", "def twice")],
    "objective-c": [("class", "/// A view.\n@interface"), ("method", "// Draws.\n- (void)draw"), ("function", "static int")],
    "php": [("class", "/** A user. */\n#[Entity]"), ("method", "    /** Returns the name"), ("function", "// Adds two")],
    "ruby": [("class", "  # An invoice."), ("method", "    # The sum"), ("method", "    def self"), ("function", "def main")],
    "shell": [("function", "# Prints a message.\nlog()"), ("function", "# Removes"), ("module", "if [[")],
    "powershell": [("function", "<# .SYNOPSIS Greets"), ("class", "# A cart.\nclass"), ("method", "    [int] Twice")],
    "lua": [("function", "--- Adds two numbers.\n-- @param"), ("function", "-- A stack."), ("function", "M.map = function")],
    "julia": [("class", '"A point in the plane."\nstruct'), ("function", '"""\n    area(points)'), ("function", "macro twice")],
    "haskell": [("class", "-- | A cart.\ndata"), ("class", "class Priced"), ("function", "-- | The sum of all")],
    "ocaml": [("class", "(** A point. *)\ntype"), ("module", "module Stack"), ("function", "(* Adds two points. *)\nlet add")],
    "elixir": [("class", "defmodule Shop.Cart"), ("method", "  # Adds a line.\n  @doc"), ("class", "defimpl String.Chars")],
    "zig": [("class", "/// A point.\npub const"), ("method", "    /// Adds two"), ("function", "// Doubles.\npub fn")],
    "fortran": [("function", "  ! Adds.\n  function add"), ("function", "  subroutine show"), ("function", "program main")],
    "solidity": [("class", "/// @title A token.\ncontract"), ("method", "    /// @notice Transfers"), ("class", "library")],
    "verilog": [("class", "// A counter.\nmodule"), ("method", "  // Doubles.\n  function"), ("class", "interface bus_if")],
    "vhdl": [("class", "-- A counter.\nentity"), ("class", "architecture rtl")],
    "gdscript": [("function", "# Moves the player.\nfunc"), ("class", "class Inner")],
    "glsl": [("class", "struct Light"), ("function", "// The light of"), ("function", "void main")],
    "sql": [("class", "-- All customers.\nCREATE TABLE"), ("class", "-- The latest"), ("function", "CREATE OR REPLACE")],
    "terraform": [("class", "# The bucket.\nresource"), ("class", "variable")],
    "css": [("class", "/* The cart. */\n.cart"), ("module", "@media")],
    "scss": [("function", "// Rounds the corners.\n@mixin"), ("class", ".cart {")],
    "html": [("module", "  <!-- The cart. -->\n  <main"), ("function", "    function render")],
    "vue": [("module", "<template>"), ("function", "// Adds a line.\nfunction"), ("module", "<style scoped")],
    "svelte": [("function", "  // Greets.\n  function"), ("module", "<main>")],
}  # fmt: skip
