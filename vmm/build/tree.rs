//! Turns the filter that seccompiler makes into one that searches.
//!
//! seccompiler compares the system call's number with one listed number after the other. That costs
//! at each call whose arguments are looked at, and once more when a filter is installed: the kernel
//! then walks it for every number there is. Here the numbers are ranges, found by bisection:
//!
//! ```text
//!   check of the architecture       as it was
//!   load the number                 as it was
//!   number ≥ 16? ─ yes ─▶ number ≥ 39? ─ yes ─▶ …
//!        └ no ─▶ …             └ no ─▶ allow | mismatch | check of arguments, as it was
//! ```

use seccompiler::sock_filter;

/// `BPF_JMP | BPF_JEQ | BPF_K`, `BPF_JMP | BPF_JGE | BPF_K`, `BPF_JMP | BPF_JA`, `BPF_RET | BPF_K`,
/// `BPF_LD | BPF_W | BPF_ABS`.
const JEQ: u16 = 0x15;
const JGE: u16 = 0x35;
const JA: u16 = 0x05;
const RET: u16 = 0x06;
const LD: u16 = 0x20;

/// Architecture loaded, compared, or else refused; number loaded.
const PROLOGUE: usize = 4;

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// The decision about the numbers from `first` up to the next range.
struct Range {
    first: u32,
    code: Vec<sock_filter>,
}

/// `linear`, whose every decision this makes.
pub(crate) fn search(linear: &[sock_filter]) -> Vec<sock_filter> {
    let (prologue, chains) = linear.split_at(PROLOGUE);
    assert!(
        prologue.iter().map(|i| i.code).eq([LD, JEQ, RET, LD]),
        "seccompiler begins in another way than this knows"
    );
    let mut program = prologue.to_vec();
    program.extend(tree(&ranges(chains)));
    program
}

fn ranges(chains: &[sock_filter]) -> Vec<Range> {
    let mismatch = chains.last().expect("a filter ends with its default");
    let none = |first| Range {
        first,
        code: vec![mismatch.clone()],
    };
    let mut ranges = vec![none(0)];
    let mut at = 0;
    while let Some(head) = chains.get(at).filter(|i| i.code == JEQ) {
        let next = skipped(chains, at);
        let body = &chains[at + 1..next];
        let code = match arrival(body, 0) {
            always if body[always].code == RET => vec![body[always].clone()],
            _ => body.to_vec(),
        };
        ranges.push(Range {
            first: head.k,
            code,
        });
        ranges.push(none(head.k + 1));
        at = next;
    }
    assert_eq!(at + 1, chains.len(), "only the default is left");
    joined(ranges)
}

/// Where a call of another number than the chain at `at` comes to: the next chain.
fn skipped(chains: &[sock_filter], at: usize) -> usize {
    arrival(chains, at + 1 + usize::from(chains[at].jf))
}

/// Where jumps without a condition lead.
fn arrival(code: &[sock_filter], mut at: usize) -> usize {
    while let Some(jump) = code.get(at).filter(|i| i.code == JA) {
        at += 1 + usize::try_from(jump.k).expect("jumps are short");
    }
    at
}

/// In order, without empty ranges, those with one decision made one.
fn joined(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_by_key(|r| r.first);
    let mut all: Vec<Range> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            // It ends where it began: the number after a listed one is listed, too.
            Some(last) if last.first == range.first => last.code = range.code,
            _ => all.push(range),
        }
    }
    all.dedup_by(|later, earlier| later.code == earlier.code);
    all
}

fn tree(ranges: &[Range]) -> Vec<sock_filter> {
    if let [one] = ranges {
        return one.code.clone();
    }
    let (below, above) = ranges.split_at(ranges.len() / 2);
    let split = above[0].first;
    let (below, above) = (tree(below), tree(above));
    let mut code = match u8::try_from(below.len()) {
        Ok(over) => vec![instruction(JGE, over, 0, split)],
        Err(_) => {
            let over = u32::try_from(below.len()).expect("programs are short");
            vec![instruction(JGE, 0, 1, split), instruction(JA, 0, 0, over)]
        }
    };
    code.extend(below);
    code.extend(above);
    code
}
