// LaTeX of answers → MathML, when a sample is looked at: the subset that mathematics texts use. What it does not know is shown as
// its source. Nothing of a formula is ever parsed as markup.

const MATHML = "http://www.w3.org/1998/Math/MathML";
const FORMULA_LIMIT = 4000; // characters of one formula
const FORMULA_DEPTH = 60;
const ENVIRONMENTS = "equation|align|aligned|gather|gathered|split|cases|array|smallmatrix|[bpvBV]?matrix";
const FORMULA = new RegExp(
  String.raw`\$\$([^]{1,4000}?)\$\$|\\\[([^]{1,4000}?)\\\]|\\\(([^]{1,4000}?)\\\)` +
    String.raw`|(\\begin\{(${ENVIRONMENTS})(\*?)\}[^]{1,4000}?\\end\{\5\6\})` +
    String.raw`|\$(?=\S)([^$\n]{0,999}?\S)\$(?!\d)|(\\boxed\{)`,
  "g",
);

/** The formulas of a text in order: {start, end, source, display}. */
function findFormulas(text) {
  const found = [];
  FORMULA.lastIndex = 0;
  for (let match; (match = FORMULA.exec(text)); ) {
    const [whole, dollars, bracket, parenthesis, environment, , , dollar, boxed] = match;
    let end = match.index + whole.length;
    if (boxed) {
      end = closingBrace(text, end);
      if (end < 0) continue;
      FORMULA.lastIndex = end;
    }
    const source = dollars ?? bracket ?? parenthesis ?? environment ?? dollar ?? text.slice(match.index, end);
    found.push({ start: match.index, end, source, display: (dollars ?? bracket ?? environment) !== undefined });
  }
  return found;
}

function closingBrace(text, from) {
  let depth = 1;
  for (let place = from; place < Math.min(text.length, from + FORMULA_LIMIT); place++) {
    if (text[place] === "\\") place++;
    else if (text[place] === "{") depth++;
    else if (text[place] === "}" && --depth === 0) return place + 1;
  }
  return -1;
}

/** A <math> element, or null for a formula outside the subset. */
function renderFormula(source, display) {
  if (source.length > FORMULA_LIMIT) return null;
  try {
    const math = new FormulaParser(source, display).whole();
    if (display) math.setAttribute("display", "block");
    math.setAttribute("aria-label", source.trim());
    return math;
  } catch (error) {
    if (error instanceof FormulaError) return null;
    throw error;
  }
}

class FormulaError extends Error {}

function mathNode(tag, children = [], attributes = {}) {
  return fill(document.createElementNS(MATHML, tag), attributes, children);
}

function pairs(text) {
  return Object.fromEntries(text.trim().split(/\s+/).map((pair) => pair.split("=")));
}

const LETTERS = pairs(`alpha=α beta=β gamma=γ delta=δ epsilon=ϵ varepsilon=ε zeta=ζ eta=η theta=θ vartheta=ϑ iota=ι kappa=κ
  lambda=λ mu=μ nu=ν xi=ξ omicron=ο pi=π varpi=ϖ rho=ρ varrho=ϱ sigma=σ varsigma=ς tau=τ upsilon=υ phi=ϕ varphi=φ chi=χ psi=ψ
  omega=ω Gamma=Γ Delta=Δ Theta=Θ Lambda=Λ Xi=Ξ Pi=Π Sigma=Σ Upsilon=Υ Phi=Φ Psi=Ψ Omega=Ω infty=∞ partial=∂ nabla=∇ ell=ℓ
  hbar=ℏ Re=ℜ Im=ℑ aleph=ℵ emptyset=∅ varnothing=∅ imath=ı jmath=ȷ degree=° angle=∠ triangle=△ square=□ Box=□ star=⋆
  prime=′ top=⊤ bot=⊥ forall=∀ exists=∃ nexists=∄ checkmark=✓ dagger=† S=§ complement=∁ hslash=ℏ`);
const OPERATORS = pairs(`cdot=⋅ times=× div=÷ pm=± mp=∓ ast=∗ circ=∘ bullet=∙ oplus=⊕ ominus=⊖ otimes=⊗ odot=⊙ wedge=∧ vee=∨
  land=∧ lor=∨ lnot=¬ neg=¬ cap=∩ cup=∪ setminus=∖ sqcup=⊔ sqcap=⊓ uplus=⊎ amalg=⨿ diamond=⋄ le=≤ leq=≤ leqslant=⩽ ge=≥ geq=≥
  geqslant=⩾ ne=≠ neq=≠ equiv=≡ approx=≈ cong=≅ sim=∼ simeq=≃ asymp=≍ propto=∝ ll=≪ gg=≫ lt=< gt=> prec=≺ succ=≻ preceq=⪯
  succeq=⪰ subset=⊂ supset=⊃ subseteq=⊆ supseteq=⊇ subsetneq=⊊ nsubseteq=⊈ in=∈ notin=∉ ni=∋ mid=∣ nmid=∤ parallel=∥
  perp=⊥ models=⊨ vdash=⊢ dashv=⊣ to=→ rightarrow=→ leftarrow=← gets=← leftrightarrow=↔ Rightarrow=⇒ Leftarrow=⇐
  Leftrightarrow=⇔ iff=⟺ implies=⟹ impliedby=⟸ longrightarrow=⟶ longleftarrow=⟵ Longrightarrow=⟹ Longleftrightarrow=⟺ mapsto=↦
  longmapsto=⟼ uparrow=↑ downarrow=↓ updownarrow=↕ nearrow=↗ searrow=↘ hookrightarrow=↪ rightleftharpoons=⇌ ldots=… dots=…
  cdots=⋯ dotsc=… dotsb=⋯ vdots=⋮ ddots=⋱ colon=: therefore=∴ because=∵ trianglelefteq=⊴ lesssim=≲ gtrsim=≳ doteq=≐ bigcirc=◯
  langle=⟨ rangle=⟩ lfloor=⌊ rfloor=⌋ lceil=⌈ rceil=⌉ lvert=| rvert=| vert=| lVert=‖ rVert=‖ Vert=‖ lbrace={ rbrace=} lbrack=[
  rbrack=] backslash=\\ upharpoonright=↾ rtimes=⋊ ltimes=⋉ divides=∣`);
const LARGE = pairs(`sum=∑ prod=∏ coprod=∐ bigcup=⋃ bigcap=⋂ bigoplus=⨁ bigotimes=⨂ bigvee=⋁ bigwedge=⋀`);
const INTEGRALS = pairs(`int=∫ iint=∬ iiint=∭ oint=∮`);
const FUNCTIONS = new Set(`sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth log ln lg exp det dim ker deg arg hom
  gcd lcm max min sup inf lim limsup liminf Pr`.split(/\s+/));
const LIMITS = new Set(`max min sup inf lim limsup liminf gcd det Pr`.split(" "));
const ACCENTS = pairs(`hat=^ widehat=^ bar=¯ vec=→ overrightarrow=→ overleftarrow=← tilde=~ widetilde=~ dot=˙ ddot=¨
  overbrace=⏞ check=ˇ breve=˘ acute=´ grave=\` overleftrightarrow=↔ overarc=⌒ wideparen=⌒`);
const UNDER = pairs(`underbrace=⏟`);
const SPACES = { ",": 0.17, ":": 0.22, ">": 0.22, ";": 0.28, "!": -0.17, " ": 0.3, quad: 1, qquad: 2, thinspace: 0.17, enspace: 0.5, space: 0.3, medspace: 0.22 };
const TEXTS = new Set("text textrm textbf textit textsf texttt textnormal mbox hbox mathrm operatorname mathit mathsf mathtt rm".split(" "));
const STYLED = { mathbb: "double", Bbb: "double", mathbf: "bold", boldsymbol: "bold", bm: "bold", bold: "bold", mathcal: "script", mathscr: "script", mathfrak: "fraktur" };
const FRACTIONS = new Set("frac dfrac tfrac cfrac".split(" "));
const IGNORED = new Set(`displaystyle textstyle scriptstyle scriptscriptstyle limits nolimits nonumber notag big Big bigg Bigg bigl
  bigr Bigl Bigr biggl biggr Biggl Biggr bigm Bigm middle hline allowbreak noindent centering mathstrut strut relax mathord mathbin mathrel
  mathop normalsize large Large small it bf`.split(/\s+/));
const FENCES = { pmatrix: "()", bmatrix: "[]", Bmatrix: "{}", vmatrix: "||", Vmatrix: "‖‖" };
const STYLES = {
  double: { A: 0x1d538, a: 0x1d552, 0: 0x1d7d8, odd: pairs("C=ℂ H=ℍ N=ℕ P=ℙ Q=ℚ R=ℝ Z=ℤ") },
  bold: { A: 0x1d400, a: 0x1d41a, 0: 0x1d7ce, odd: {} },
  script: { A: 0x1d49c, a: 0x1d4b6, odd: pairs("B=ℬ E=ℰ F=ℱ H=ℋ I=ℐ L=ℒ M=ℳ R=ℛ e=ℯ g=ℊ o=ℴ") },
  fraktur: { A: 0x1d504, a: 0x1d51e, odd: pairs("C=ℭ H=ℌ I=ℑ R=ℜ Z=ℨ") },
};

function styled(character, style) {
  const table = STYLES[style];
  if (table.odd[character]) return table.odd[character];
  for (const [first, last] of ["AZ", "az", "09"]) {
    if (character >= first && character <= last && table[first]) {
      return String.fromCodePoint(table[first] + character.codePointAt(0) - first.codePointAt(0));
    }
  }
  return character;
}

/** By recursive descent: a row is atoms with their scripts, an atom a character, a command with its arguments, or a row in braces. */
class FormulaParser {
  constructor(source, display) {
    this.tokens = source.match(/\\[A-Za-z]+|\\[^]|%[^\n]*\n?|\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\s+|[^]/gu) ?? [];
    this.display = display;
    this.at = 0;
    this.depth = 0;
  }

  whole() {
    const rows = this.rows(() => this.at >= this.tokens.length);
    if (this.at < this.tokens.length) throw new FormulaError(`unexpected ${this.tokens[this.at]}`);
    return mathNode("math", [rows.length === 1 && rows[0].length === 1 ? rows[0][0] : this.table(rows, "align")]);
  }

  peek() {
    while (this.at < this.tokens.length && /^(\s|%)/.test(this.tokens[this.at])) this.at++;
    return this.tokens[this.at];
  }

  next() {
    const token = this.peek();
    if (token === undefined) throw new FormulaError("ends too early");
    this.at++;
    return token;
  }

  /** Lines of cells, each an <mrow>, until `done`. */
  rows(done) {
    const rows = [[]];
    for (;;) {
      rows.at(-1).push(this.row(() => done() || this.peek() === "&" || this.peek() === "\\\\" || this.peek() === "\\newline"));
      if (this.peek() === "&" && !done()) this.at++;
      else if ((this.peek() === "\\\\" || this.peek() === "\\newline") && !done()) {
        this.at++;
        if (this.peek() === "[") this.bracket(); // a gap between the lines
        rows.push([]);
      } else break;
    }
    if (rows.length > 1 && rows.at(-1).every((cell) => cell.childElementCount === 0)) rows.pop();
    return rows;
  }

  row(done) {
    if (++this.depth > FORMULA_DEPTH) throw new FormulaError("too deep");
    const atoms = [];
    while (this.peek() !== undefined && !done()) {
      if (this.peek() === "}") throw new FormulaError("a brace too many");
      const atom = this.scripted();
      if (atom) atoms.push(atom);
    }
    this.depth--;
    return mathNode("mrow", atoms);
  }

  scripted() {
    let base = "^_'".includes(this.peek()) ? mathNode("mrow") : this.atom();
    let above = null;
    let below = null;
    let limits = base?.dataset?.limits;
    for (;;) {
      const token = this.peek();
      if (token === "\\limits" || token === "\\nolimits") {
        limits = token === "\\limits" ? "always" : null;
        this.at++;
      } else if (token === "^" && !above) {
        this.at++;
        above = this.argument();
      } else if (token === "_" && !below) {
        this.at++;
        below = this.argument();
      } else if (token === "'") {
        let primes = "";
        for (; this.peek() === "'"; this.at++) primes += "′";
        above = mathNode("mrow", [mathNode("mo", [primes]), above]);
      } else break;
    }
    if (!above && !below) return base;
    base ??= mathNode("mrow");
    const stacked = limits === "always" || (limits && this.display);
    if (above && below) return mathNode(stacked ? "munderover" : "msubsup", [base, below, above]);
    if (above) return mathNode(stacked ? "mover" : "msup", [base, above]);
    return mathNode(stacked ? "munder" : "msub", [base, below]);
  }

  /** One character, or a row in braces. */
  argument() {
    if (this.peek() === "{") return this.braced();
    return this.atom(true) ?? mathNode("mrow");
  }

  braced() {
    this.expect("{");
    const row = this.row(() => this.peek() === "}");
    this.expect("}");
    return row;
  }

  bracket() {
    this.expect("[");
    const row = this.row(() => this.peek() === "]");
    this.expect("]");
    return row;
  }

  expect(token) {
    if (this.next() !== token) throw new FormulaError(`${token} is missing`);
  }

  /** The source in braces, as it stands. */
  raw() {
    if (this.peek() !== "{") return this.next();
    this.at++;
    let text = "";
    for (let depth = 1; ; this.at++) {
      const token = this.tokens[this.at];
      if (token === undefined) throw new FormulaError("a brace is missing");
      if (token === "{") depth++;
      if (token === "}" && --depth === 0) break;
      text += token;
    }
    this.at++;
    return text;
  }

  /** single: as a script or argument without braces, of which a number gives its first digit only. */
  atom(single = false) {
    const token = this.next();
    if (token === "{") {
      this.at--;
      return this.braced();
    }
    if (token.startsWith("\\")) return this.command(token.slice(1));
    if (/^\d/.test(token)) {
      if (single && token.length > 1) {
        this.tokens.splice(this.at, 0, token.slice(1));
        return mathNode("mn", [token[0]]);
      }
      return mathNode("mn", [token]);
    }
    if (token === "~") return this.gap(0.3);
    if (token === "&") throw new FormulaError("a cell outside a table");
    if (/\p{L}/u.test(token)) return mathNode(/[\u2e80-\uffef]/.test(token) ? "mtext" : "mi", [token]);
    if ("()[]|".includes(token)) return mathNode("mo", [token], { stretchy: "false" });
    return mathNode("mo", [{ "-": "−", "*": "∗", "'": "′" }[token] ?? token]);
  }

  gap(em) {
    return mathNode("mspace", [], { width: `${em}em` });
  }

  command(name) {
    if (Object.hasOwn(LETTERS, name)) return mathNode("mi", [LETTERS[name]], /^[A-Z]/.test(name) ? { mathvariant: "normal" } : {});
    if (Object.hasOwn(OPERATORS, name)) return mathNode("mo", [OPERATORS[name]], { stretchy: "false" });
    if (Object.hasOwn(LARGE, name)) return mathNode("mo", [LARGE[name]], { "data-limits": "display" });
    if (Object.hasOwn(INTEGRALS, name)) return mathNode("mo", [INTEGRALS[name]]);
    if (FUNCTIONS.has(name)) return mathNode("mi", [name], { "data-limits": LIMITS.has(name) && "display" });
    if (Object.hasOwn(SPACES, name)) return this.gap(SPACES[name]);
    if ("{}%$#&_".includes(name)) return "{}".includes(name) ? mathNode("mo", [name], { stretchy: "false" }) : mathNode("mtext", [name]);
    if (name === "|") return mathNode("mo", ["‖"], { stretchy: "false" });
    if (IGNORED.has(name)) return null;
    if (FRACTIONS.has(name)) return this.styledFraction(name);
    if (name === "overline" || name === "underline") return mathNode("mrow", [this.argument()], { class: name });
    if (Object.hasOwn(ACCENTS, name)) return mathNode("mover", [this.argument(), mathNode("mo", [ACCENTS[name]])], { accent: "true" });
    if (Object.hasOwn(UNDER, name)) return mathNode("munder", [this.argument(), mathNode("mo", [UNDER[name]])]);
    if (TEXTS.has(name)) return this.text(name);
    if (Object.hasOwn(STYLED, name)) {
      const row = this.argument();
      for (const node of row.matches("mi, mn") ? [row] : row.querySelectorAll("mi, mn")) {
        node.textContent = Array.from(node.textContent, (character) => styled(character, STYLED[name])).join("");
        if (node.localName === "mi") node.setAttribute("mathvariant", "normal");
      }
      return row;
    }
    return this.special(name);
  }

  special(name) {
    switch (name) {
      case "sqrt":
        if (this.peek() !== "[") return mathNode("msqrt", [this.argument()]);
        return this.root(this.bracket());
      case "boxed": case "fbox":
        return mathNode("mrow", [this.argument()], { class: "boxed" });
      case "binom": case "dbinom": case "tbinom":
        return this.fenced("(", [mathNode("mfrac", [this.argument(), this.argument()], { linethickness: "0" })], ")");
      case "overset": case "stackrel": {
        const above = this.argument();
        return mathNode("mover", [this.argument(), above]);
      }
      case "underset": {
        const below = this.argument();
        return mathNode("munder", [this.argument(), below]);
      }
      case "left": return this.stretched();
      case "begin": return this.environment(this.raw());
      case "not": {
        const next = this.atom();
        next.textContent += "\u0338";
        return next;
      }
      case "mod": case "bmod":
        return mathNode("mo", ["mod"], { lspace: "0.3em", rspace: "0.3em" });
      case "pmod":
        return mathNode("mrow", [this.gap(0.5), mathNode("mo", ["("]), mathNode("mi", ["mod"]), this.gap(0.3), this.argument(), mathNode("mo", [")"])]);
      case "tag":
        return mathNode("mtext", [`\u2003(${this.raw()})`]);
      case "color": this.raw(); return null;
      case "textcolor": this.raw(); return this.argument();
      case "cancel": case "phantom": case "mathstrut":
        return mathNode("mrow", [this.argument()], { class: name });
      case "xrightarrow": case "xleftarrow":
        return mathNode("mover", [mathNode("mo", [name === "xrightarrow" ? "→" : "←"], { stretchy: "true" }), this.argument()]);
      case "hspace": case "vspace": this.raw(); return this.gap(0.5);
      default:
        throw new FormulaError(`\\${name} is not known`);
    }
  }

  root(index) {
    return mathNode("mroot", [this.argument(), index]);
  }

  styledFraction(name) {
    const fraction = mathNode("mfrac", [this.argument(), this.argument()]);
    return name === "frac" ? fraction : mathNode("mstyle", [fraction], { displaystyle: name === "tfrac" ? "false" : "true" });
  }

  text(name) {
    if (this.peek() === "*") this.at++; // \operatorname*
    if (name === "rm") return null;
    const text = this.raw().replace(/\\([ ,;%$&_#{}])/g, (_, character) => (",; ".includes(character) ? " " : character)).replaceAll("$", "");
    if (text.includes("\\")) throw new FormulaError("a command in a text");
    if (name === "mathrm" || name === "operatorname") return mathNode("mi", [text.trim()], { mathvariant: "normal" });
    return mathNode("mtext", [text.replace(/^\s+|\s+$/g, "\u00a0")], { class: /bf$/.test(name) ? "bold" : null });
  }

  delimiter() {
    const token = this.next();
    if (token === ".") return "";
    const name = token.slice(1);
    if (!token.startsWith("\\")) return token;
    if (Object.hasOwn(OPERATORS, name)) return OPERATORS[name];
    if ("{}".includes(name)) return name;
    if (name === "|") return "‖";
    throw new FormulaError(`${token} is no delimiter`);
  }

  fenced(open, inside, close) {
    const fence = (text) => text && mathNode("mo", [text], { stretchy: "true", fence: "true", symmetric: "true" });
    return mathNode("mrow", [fence(open), ...inside, fence(close)].filter(Boolean));
  }

  stretched() {
    const open = this.delimiter();
    const inside = this.row(() => this.peek() === "\\right");
    this.expect("\\right");
    return this.fenced(open, [inside], this.delimiter());
  }

  environment(name) {
    const plain = name.replace("*", "");
    if (!new RegExp(`^(?:${ENVIRONMENTS})$`).test(plain)) throw new FormulaError(`${name} is not known`);
    if (plain === "array") this.raw();
    const rows = this.rows(() => this.peek() === "\\end");
    this.expect("\\end");
    if (this.raw() !== name) throw new FormulaError(`${name} does not end`);
    if (plain === "cases") return this.fenced("{", [this.table(rows, "left")], "");
    if (Object.hasOwn(FENCES, plain)) return this.fenced(FENCES[plain][0], [this.table(rows, "center")], FENCES[plain][1]);
    return this.table(rows, plain === "array" || plain.endsWith("matrix") || plain.startsWith("gather") ? "center" : "align");
  }

  /** columns: "center", "left", or "align": right and left in turn. */
  table(rows, columns) {
    const side = (place) => (columns === "align" ? (place % 2 ? "left" : "right") : columns);
    const cells = (row) => row.map((cell, place) => mathNode("mtd", [cell], { class: `to-${side(row.length === 1 && columns === "align" ? 1 : place)}` }));
    return mathNode("mtable", rows.map((row) => mathNode("mtr", cells(row))), { displaystyle: columns === "align" ? "true" : null });
  }
}
