//! What is wrong with a configuration: all of it at once, each with its place and a remedy.

use std::fmt;

/// A place in the configuration: the dotted path of a key, and its line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// `backends.gpu.hourly_usd`; empty for the file itself.
    pub path: String,
    /// Counted from 1; none when the text did not come from a file.
    pub line: Option<usize>,
}

impl Place {
    /// The place of a key below this one. A line is the parent's until a better one is known.
    #[must_use]
    pub fn child(&self, key: &str) -> Self {
        let bare =
            !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        let key = if bare { key.to_owned() } else { format!("{key:?}") };
        let path = if self.path.is_empty() { key } else { format!("{}.{key}", self.path) };
        Self { path, line: self.line }
    }

    /// The place of an element of an array; elements are counted from 1, as people do.
    #[must_use]
    pub fn element(&self, index: usize) -> Self {
        Self { path: format!("{}[{}]", self.path, index + 1), line: self.line }
    }
}

/// One thing that is wrong, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub place: Place,
    /// Lower case, no full stop: ``unknown key `hourly_us` ``.
    pub what: String,
    /// ``did you mean `hourly_usd`?``
    pub remedy: String,
}

/// `line: path: what; remedy`, without what is unknown.
impl fmt::Display for Problem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.place.line {
            write!(out, "{line}: ")?;
        }
        if !self.place.path.is_empty() {
            write!(out, "{}: ", self.place.path)?;
        }
        write!(out, "{}; {}", self.what, self.remedy)
    }
}

/// Everything that is wrong with one configuration, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems {
    /// The file, or `command line`.
    pub origin: String,
    pub problems: Vec<Problem>,
}

impl Problems {
    /// A single problem with the origin as a whole.
    pub(crate) fn one(origin: &str, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        let problem = Problem { place: Place::default(), what: what.into(), remedy: remedy.into() };
        Self { origin: origin.to_owned(), problems: vec![problem] }
    }
}

/// A problem a line, each beginning with the origin, so that an editor can jump there.
impl fmt::Display for Problems {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let separator = if problem.place.line.is_some() { ":" } else { ": " };
            let end = if index + 1 < self.problems.len() { "\n" } else { "" };
            write!(out, "{}{separator}{problem}{end}", self.origin)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// Collects problems and warnings while a configuration is read and checked.
#[derive(Debug)]
pub(super) struct Findings {
    /// Byte offset at which each line begins.
    line_starts: Vec<usize>,
    pub(super) problems: Vec<Problem>,
    /// What works, and is probably not what was meant.
    pub(super) warnings: Vec<Problem>,
}

impl Findings {
    pub(super) fn new(text: &str) -> Self {
        let after_breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Self {
            line_starts: std::iter::once(0).chain(after_breaks).collect(),
            problems: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// The line, counted from 1, on which a byte stands.
    pub(super) fn line_of(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= offset)
    }

    pub(super) fn problem(&mut self, place: &Place, what: impl Into<String>, remedy: impl Into<String>) {
        self.problems.push(Problem { place: place.clone(), what: what.into(), remedy: remedy.into() });
    }

    /// A key that must be there. One that is there and could not be read has been reported already.
    pub(super) fn missing(&mut self, table: &Place, key: &str, remedy: impl Into<String>) {
        let path = table.child(key).path;
        let of_key = |problem: &Problem| {
            let rest = problem.place.path.strip_prefix(&path);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        if !self.problems.iter().any(of_key) {
            self.problem(table, format!("has no `{key}`"), remedy);
        }
    }

    pub(super) fn warning(&mut self, place: &Place, what: impl Into<String>, remedy: impl Into<String>) {
        self.warnings.push(Problem { place: place.clone(), what: what.into(), remedy: remedy.into() });
    }
}

/// The known word nearest to a misspelt one, if one is near enough to have been meant.
pub(super) fn nearest<'a>(written: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A third of the letters may be wrong: `hourly_us`, `base-url`, `polices`; not `port` for `path`.
    let tolerance = written.chars().count().max(3) / 3;
    known
        .into_iter()
        .map(|word| (edit_distance(written, word), word))
        .filter(|(distance, _)| *distance <= tolerance)
        .min()
        .map(|(_, word)| word)
}

/// Levenshtein's distance: insertions, deletions and substitutions from one word to the other.
fn edit_distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (index, letter) in from.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], index + 1);
        for column in 0..to.len() {
            let substituted = diagonal + usize::from(letter != to[column]);
            diagonal = row[column + 1];
            row[column + 1] = substituted.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_counts_single_letter_edits() {
        for (from, to, distance) in [("kitten", "sitting", 3), ("", "abc", 3), ("same", "same", 0)] {
            assert_eq!(edit_distance(from, to), distance, "{from} {to}");
        }
    }

    #[test]
    fn only_a_near_word_is_suggested() {
        let known = ["hourly_usd", "base_url", "kind"];
        assert_eq!(nearest("hourly_us", known), Some("hourly_usd"));
        assert_eq!(nearest("base-url", known), Some("base_url"));
        assert_eq!(nearest("colour", known), None);
    }

    #[test]
    fn a_line_is_counted_from_one() {
        let findings = Findings::new("a\nbc\n\nd");
        assert_eq!([0, 1, 2, 4, 5, 6, 7].map(|at| findings.line_of(at)), [1, 1, 2, 2, 3, 4, 4]);
    }

    #[test]
    fn a_key_that_is_not_bare_is_quoted_in_a_path() {
        let models = Place { path: "prices.models".to_owned(), line: None };
        assert_eq!(models.child("gpt-4.1").path, "prices.models.\"gpt-4.1\"");
        assert_eq!(models.child("gpt-4o").element(0).path, "prices.models.gpt-4o[1]");
    }
}
