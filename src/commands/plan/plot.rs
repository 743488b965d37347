//! The picture of a plan: cost a day against requests a day, both on logarithmic axes.

use std::path::Path;

use anyhow::bail;
use plotters::prelude::*;

use super::Comparison;
use super::advice::grouped;

const SIZE: (u32, u32) = (1000, 620);
const API: RGBColor = RGBColor(0, 114, 178);
const OWN: RGBColor = RGBColor(0, 158, 115);
const MIX: RGBColor = RGBColor(106, 63, 196);

/// Pixels and letters of a line of the note.
const NOTE_LINE: u32 = 16;
const NOTE_COLUMNS: usize = 150;

/// Volumes drawn, from 100 to 10 million a day, evenly on a logarithmic axis.
const POINTS: u32 = 400;

/// The least that is drawn, USD a day.
const LOWEST: f64 = 1.0;

pub(super) fn draw(comparison: &Comparison, path: &Path) -> anyhow::Result<()> {
    if path.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("svg")) {
        bail!("pictures are SVG; give it the ending `.svg`");
    }
    let rows: Vec<_> = (0..=POINTS).map(|point| comparison.row(volume(point))).collect();
    let highest = rows.iter().map(|row| row.api_usd.max(row.self_hosted_usd)).fold(1.0, f64::max) * 4.0;
    let whole = SVGBackend::new(path, SIZE).into_drawing_area();
    whole.fill(&WHITE)?;
    let note = lines_of(comparison.note.as_deref().unwrap_or_default());
    let (root, below) = whole.split_vertically(SIZE.1 - NOTE_LINE * u32::try_from(note.len())?);
    for (line, top) in note.iter().zip((0..).step_by(NOTE_LINE as usize)) {
        below.draw(&Text::new(line.clone(), (14, top), ("sans-serif", 12)))?;
    }
    let title = format!("{} against {}", comparison.api_name, comparison.machine);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 22))
        .margin(14)
        // The last volume is centred on the edge, and long.
        .margin_right(44)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d((100.0..1e7).log_scale(), (LOWEST..highest).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("requests a day")
        .y_desc("USD a day")
        .x_label_formatter(&|volume| grouped(*volume))
        .y_label_formatter(&|usd| grouped(*usd))
        .draw()?;
    let lines: [(&str, RGBColor, Vec<f64>); 3] = [
        ("API", API, rows.iter().map(|row| row.api_usd).collect()),
        (
            "self-hosted, as many machines as it needs",
            OWN,
            rows.iter().map(|row| row.self_hosted_usd).collect(),
        ),
        ("the cheapest mix", MIX, rows.iter().map(|row| row.mix_usd).collect()),
    ];
    for (width, (name, colour, costs)) in [2, 2, 5].into_iter().zip(lines) {
        let points = (0..=POINTS)
            .zip(costs)
            .map(|(point, cost)| (position(point), cost))
            .filter(|(_, cost)| *cost >= LOWEST);
        let style = colour.mix(if width > 2 { 0.45 } else { 1.0 }).stroke_width(width);
        chart
            .draw_series(LineSeries::new(points, style))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    let break_even =
        crate::economics::break_even::break_even_requests_per_day(&comparison.pool, &comparison.sample, 1);
    if let Some(volume) = break_even.filter(|volume| (100.0..1e7).contains(volume)) {
        chart
            .draw_series(LineSeries::new([(volume, LOWEST), (volume, highest)], BLACK.mix(0.6)))?
            .label(format!("break-even: {} requests a day", grouped(volume)))
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLACK.mix(0.6)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    whole.present()?;
    Ok(())
}

/// A text in lines that fit below the picture.
fn lines_of(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut().filter(|line| line.len() + word.len() < NOTE_COLUMNS) {
            Some(line) => {
                line.push(' ');
                line.push_str(word);
            }
            None => lines.push(word.to_owned()),
        }
    }
    lines
}

fn position(point: u32) -> f64 {
    100.0 * 1e5_f64.powf(f64::from(point) / f64::from(POINTS))
}

fn volume(point: u32) -> u64 {
    super::advice::whole(position(point))
}
