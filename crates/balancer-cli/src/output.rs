//! How all commands print: aligned columns as kubectl has them, or JSON.

use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets::NOTHING};
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

/// The form of a command's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table with the columns that most people need
    Table,
    /// A table with all columns
    Wide,
    /// JSON, for programs
    Json,
}

/// Writes rows under a header, in columns that are as wide as their longest value and three spaces apart.
pub(crate) fn write_table(
    out: &mut impl Write,
    header: &[&str],
    rows: impl IntoIterator<Item = Vec<String>>,
) -> io::Result<()> {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Writes one JSON document and a line's end.
pub(crate) fn write_json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

/// The address of a page of the documentation, or of a section, by its path from the root of the repository.
macro_rules! address {
    ($page:literal) => {
        concat!(env!("CARGO_PKG_REPOSITORY"), "/blob/main/", $page)
    };
}
pub(crate) use address;

/// A number without the digits that only computing adds.
pub(crate) fn rounded(number: f64) -> f64 {
    (number * 1e9).round() / 1e9
}

/// Without what a terminal would obey.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// The first characters of a text; an ellipsis stands for the others.
pub(crate) fn shorten(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// The most characters that are quoted of a text of another program.
const MAX_QUOTED: usize = 400;

/// The start of a text that another program has written, on one line.
pub(crate) fn quoted(text: &str) -> String {
    shorten(&text.split_whitespace().collect::<Vec<_>>().join(" "), MAX_QUOTED)
}

/// A share as a whole percentage.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.0}%", share * 100.0)
}

/// How long ago this was, as kubectl writes it: in one or two units.
pub(crate) fn age(since: Timestamp, now: Timestamp) -> String {
    let seconds = (now.as_second() - since.as_second()).max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |large: i64, unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{large}{unit}"),
        _ => format!("{large}{unit}{small}{small_unit}"),
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        _ => format!("{days}d"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_those_of_kubectl() {
        let ages = [0, 119, 120, 599, 600, 10_799, 10_800, 11_000, 28_800, 172_800, 180_000, 700_000];
        let now = Timestamp::from_second(1_000_000).expect("a time");
        let text = |seconds: i64| age(Timestamp::from_second(1_000_000 - seconds).expect("a time"), now);
        assert_eq!(
            ages.map(text),
            ["0s", "119s", "2m", "9m59s", "10m", "179m", "3h", "3h3m", "8h", "2d", "2d2h", "8d"]
        );
    }

    #[test]
    fn columns_are_as_wide_as_their_longest_value() {
        let mut out = Vec::new();
        write_table(&mut out, &["JOB", "SPOT"], [vec!["etl-nightly".into(), "3".into()]]).expect("a table");
        assert_eq!(String::from_utf8(out).expect("text"), "JOB           SPOT\netl-nightly   3\n");
    }
}
