//! `breakeven prices`: the price book, listed, checked and imported.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use crate::clock::Clock;
use crate::prices::litellm::{self, Selection};
use crate::prices::write::decimal;
use crate::prices::{self, Line, PriceFile, doubts};

/// Lists, checks and imports prices.
#[derive(Debug, Clone, Args)]
pub struct PricesArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Subcommand)]
enum Command {
    /// Print every model with its prices in USD per million tokens
    List {
        /// Read this price file instead of the one that ships with the program
        #[arg(long)]
        file: Option<PathBuf>,
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Look for prices that cannot be meant: mistaken units, discounts that cost more
    Check {
        /// Price file; without one, the prices that ship with the program
        file: Option<PathBuf>,
    },
    /// Turn LiteLLM's model_prices_and_context_window.json into a price file
    Import {
        file: PathBuf,
        /// Where to write it; without this, to standard output
        #[arg(long, short)]
        output: Option<PathBuf>,
        /// Take the models of this provider
        #[arg(long, default_value = "openai")]
        provider: String,
        /// Take this model only; may be repeated
        #[arg(long = "model")]
        models: Vec<String>,
        /// The day the prices were confirmed, YYYY-MM-DD; today if not given
        #[arg(long)]
        confirmed_at: Option<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Format {
    #[default]
    Table,
    Json,
    Csv,
}

/// Runs the command: results on stdout, notes on stderr. Status 1 when prices are doubtful.
///
/// # Errors
/// When a file cannot be read or written, or is not what it should be.
pub fn run(arguments: &PricesArgs) -> anyhow::Result<ExitCode> {
    write_to(arguments, &mut io::stdout().lock())
}

fn write_to(arguments: &PricesArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    match &arguments.command {
        Command::List { file, format } => list(&open(file.as_deref())?, *format, out),
        Command::Check { file } => check(file.as_deref(), out),
        Command::Import { file, output, provider, models, confirmed_at } => {
            let selection = Selection { provider: provider.clone(), models: models.clone() };
            import(file, output.as_deref(), &selection, confirmed_at.as_deref(), out)
        }
    }
}

fn open(file: Option<&Path>) -> anyhow::Result<PriceFile> {
    let Some(path) = file else { return Ok(prices::built_in_file()) };
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    prices::read(&text).with_context(|| format!("`{}` is not a price file", path.display()))
}

fn check(file: Option<&Path>, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let price_file = open(file)?;
    let known = prices::built_in();
    let doubts = doubts::of_file(&price_file, file.is_some().then_some(&known));
    for doubt in &doubts {
        writeln!(out, "{doubt}")?;
    }
    if !doubts.is_empty() {
        return Ok(ExitCode::from(1));
    }
    writeln!(
        out,
        "{} models, confirmed {}: nothing to doubt",
        price_file.models.len(),
        price_file.confirmed_at
    )?;
    Ok(ExitCode::SUCCESS)
}

fn import(
    map: &Path,
    output: Option<&Path>,
    selection: &Selection,
    confirmed_at: Option<&str>,
    out: &mut impl Write,
) -> anyhow::Result<ExitCode> {
    let text = std::fs::read_to_string(map).with_context(|| format!("cannot read `{}`", map.display()))?;
    let date = confirmed_at.map_or_else(today, str::to_owned);
    let (file, notes) = litellm::import(&text, selection, &date)?;
    let doubts = doubts::of_file(&file, Some(&prices::built_in()));
    let mut log = io::stderr().lock();
    for line in notes
        .iter()
        .map(|note| format!("left out: {note}"))
        .chain(doubts.iter().map(|doubt| format!("doubtful: {doubt}")))
    {
        writeln!(log, "{line}")?;
    }
    anyhow::ensure!(!file.models.is_empty(), "no model was selected; see --provider and --model");
    match output {
        Some(path) => {
            std::fs::write(path, file.to_string())
                .with_context(|| format!("cannot write `{}`", path.display()))?;
        }
        None => write!(out, "{file}")?,
    }
    Ok(ExitCode::from(u8::from(!doubts.is_empty())))
}

fn today() -> String {
    let now = i64::try_from(Clock::system().now().as_millis() / 1000).unwrap_or(0);
    jiff::Timestamp::from_second(now).unwrap_or_default().strftime("%Y-%m-%d").to_string()
}

/// One line of the list: a model, a table, a tier.
struct Row<'a> {
    model: &'a str,
    above_input_tokens: Option<u64>,
    tier: &'static str,
    line: &'a Line,
    effective_from: &'a str,
}

const PRICE_COLUMNS: [&str; 8] = [
    "input",
    "cached_input",
    "cache_write",
    "audio_input",
    "image_input",
    "output",
    "audio_output",
    "image_output",
];

fn rows(file: &PriceFile) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for (name, model) in &file.models {
        let effective_from = model.effective_from.as_deref().unwrap_or(&file.effective_from);
        let long = model.long_context.iter().map(|(above, table)| (Some(*above), table));
        for (above_input_tokens, table) in std::iter::once((None, &model.table)).chain(long) {
            rows.extend(table.lines().map(|(tier, line)| Row {
                model: name,
                above_input_tokens,
                tier: tier.as_str(),
                line,
                effective_from,
            }));
        }
    }
    rows
}

fn list(file: &PriceFile, format: Format, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    match format {
        Format::Table => table(file, out)?,
        Format::Json => {
            let rows: Vec<_> = rows(file).iter().map(as_json).collect();
            let list = json!({"unit": prices::UNIT, "source": file.source, "confirmed_at": file.confirmed_at, "prices": rows});
            writeln!(out, "{list:#}")?;
        }
        Format::Csv => csv(file, out)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn as_json(row: &Row<'_>) -> serde_json::Value {
    let mut value = json!({
        "model": row.model,
        "above_input_tokens": row.above_input_tokens,
        "tier": row.tier,
        "effective_from": row.effective_from,
    });
    for (key, price) in row.line.stated() {
        value[key] = decimal(price).into();
    }
    value
}

fn csv(file: &PriceFile, out: &mut impl Write) -> anyhow::Result<()> {
    let mut writer = csv::Writer::from_writer(out);
    writer.write_record(
        ["model", "above_input_tokens", "tier", "effective_from"].iter().chain(&PRICE_COLUMNS),
    )?;
    for row in rows(file) {
        let above = row.above_input_tokens.map(|above| above.to_string()).unwrap_or_default();
        let prices = PRICE_COLUMNS.map(|key| row.line.get(key).map(decimal).unwrap_or_default());
        let named = [row.model.to_owned(), above, row.tier.to_owned(), row.effective_from.to_owned()];
        writer.write_record(named.iter().chain(&prices))?;
    }
    writer.flush()?;
    Ok(())
}

fn table(file: &PriceFile, out: &mut impl Write) -> anyhow::Result<()> {
    let rows = rows(file);
    let width = rows.iter().map(|row| row.model.len()).max().unwrap_or(0).max("model".len());
    writeln!(
        out,
        "{:width$}  {:10} {:>9} {:>10} {:>10} {:>10} {:>10}",
        "model", "tier", "above", "input", "cached", "written", "output"
    )?;
    let mut before = "";
    for row in rows {
        let name = if row.model == before { "" } else { row.model };
        before = row.model;
        let above = row.above_input_tokens.map(|above| above.to_string()).unwrap_or_default();
        let price = |key| row.line.get(key).map(decimal).unwrap_or_default();
        writeln!(
            out,
            "{name:width$}  {:10} {above:>9} {:>10} {:>10} {:>10} {:>10}",
            row.tier,
            price("input"),
            price("cached_input"),
            price("cache_write"),
            price("output")
        )?;
    }
    writeln!(out, "\nUSD per million tokens. Source: {}, confirmed {}.", file.source, file.confirmed_at)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        arguments: PricesArgs,
    }

    fn output(words: &[&str]) -> (ExitCode, String) {
        let cli = Cli::parse_from(std::iter::once("prices").chain(words.iter().copied()));
        let mut out = Vec::new();
        let code = write_to(&cli.arguments, &mut out).unwrap();
        (code, String::from_utf8(out).unwrap())
    }

    #[test]
    fn the_shipped_prices_are_listed_in_every_format() {
        let (_, json) = output(&["list", "--format", "json"]);
        let list: serde_json::Value = serde_json::from_str(&json).unwrap();
        let mini =
            list["prices"].as_array().unwrap().iter().find(|row| row["model"] == "gpt-4o-mini").unwrap();
        assert_eq!(
            (&mini["tier"], &mini["input"], &mini["output"]),
            (&json!("standard"), &json!("0.15"), &json!("0.6"))
        );
        let (_, text) = output(&["list", "--format", "csv"]);
        assert!(text.lines().any(|line| line.starts_with("gpt-4o-mini,,standard,2026-")), "{text}");
        let (_, text) = output(&["list"]);
        assert!(text.contains("gpt-4o-mini") && text.contains("confirmed 2026-"), "{text}");
    }

    #[test]
    fn a_file_in_the_wrong_unit_fails_the_check() {
        assert_eq!(output(&["check"]).0, ExitCode::SUCCESS);
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "unit = \"usd_per_million_tokens\"\nsource = \"t\"\nconfirmed_at = 2026-01-01\neffective_from = 2026-01-01\n\
                    [models.gpt-4o-mini]\ninput = 15\noutput = 60\n";
        std::fs::write(file.path(), text).unwrap();
        let (code, text) = output(&["check", file.path().to_str().unwrap()]);
        assert_eq!(code, ExitCode::from(1));
        assert!(text.contains("in cents"), "{text}");
    }

    #[test]
    fn an_import_is_a_price_file() {
        let map = tempfile::NamedTempFile::new().unwrap();
        let json = r#"{"m": {"litellm_provider": "openai", "input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06}}"#;
        std::fs::write(map.path(), json).unwrap();
        let (code, text) = output(&["import", map.path().to_str().unwrap(), "--confirmed-at", "2026-11-24"]);
        assert_eq!(code, ExitCode::SUCCESS);
        assert_eq!(prices::read(&text).unwrap().models.len(), 1);
    }
}
