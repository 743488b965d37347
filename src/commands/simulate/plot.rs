//! The picture of a simulation: what the traffic was worth, what was held, what it all cost.

use std::path::Path;

use anyhow::bail;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::economics::NanoUsd;
use crate::simulator::engine::Outcome;

use super::Simulation;

const SIZE: (u32, u32) = (1200, 1000);

/// Points of a line at most; more would only make the file large.
const POINTS: usize = 1200;

/// Units of time and their seconds; the longest of which there are two is taken.
const UNITS: [(&str, f64); 3] = [("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)];
const SECONDS: (&str, f64) = ("seconds", 1.0);

/// Colours that stay apart for the colour-blind (Okabe and Ito), one a policy.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];

type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub(super) fn draw(simulation: &Simulation, path: &Path) -> anyhow::Result<()> {
    if path.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("svg")) {
        bail!("pictures are SVG; give it the ending `.svg`");
    }
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let panels = root.split_evenly((3, 1));
    volume(simulation, &panels[0])?;
    replicas(simulation, &panels[1])?;
    cost(simulation, &panels[2])?;
    root.present()?;
    Ok(())
}

/// The time from the start of the trace, and how many slots make a point.
struct Axis {
    /// What times are given in: days, or less for a short trace.
    unit: &'static str,
    length: f64,
    group: usize,
    /// Length of a slot in the unit.
    slot: f64,
}

fn axis(simulation: &Simulation) -> Axis {
    let slots = simulation.demand.slots.len();
    let seconds = count(slots) * simulation.demand.slot.as_secs_f64();
    let (unit, unit_seconds) = UNITS.into_iter().find(|(_, unit)| seconds >= 2.0 * unit).unwrap_or(SECONDS);
    Axis {
        unit,
        length: seconds / unit_seconds,
        group: slots.div_ceil(POINTS).max(1),
        slot: simulation.demand.slot.as_secs_f64() / unit_seconds,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a place in a picture")]
fn count(number: usize) -> f64 {
    number as f64
}

/// A number without needless decimals.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "what the chart calls")]
fn short(number: &f64) -> String {
    let thousandths = (number * 1000.0).round() / 1000.0;
    thousandths.to_string()
}

/// Means of groups of slots, at the middle of each group.
fn means(axis: &Axis, values: &[f64]) -> Vec<(f64, f64)> {
    let middle = |index: usize, length: usize| (count(index * axis.group) + count(length) / 2.0) * axis.slot;
    values
        .chunks(axis.group)
        .enumerate()
        .map(|(index, group)| (middle(index, group.len()), group.iter().sum::<f64>() / count(group.len())))
        .collect()
}

/// The top of an axis, with room for the legend.
fn top(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::MIN_POSITIVE, f64::max) * 1.35
}

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn legend<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>) -> Drawn {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

fn volume(simulation: &Simulation, area: &Area<'_>) -> Drawn {
    let axis = axis(simulation);
    let hours = simulation.demand.slot.as_secs_f64() / 3600.0;
    let bills: Vec<f64> =
        simulation.demand.slots.iter().map(|slot| slot.api_cost.to_usd_f64() / hours).collect();
    let points = means(&axis, &bills);
    let rent = simulation.pool.hourly.to_usd_f64();
    let highest = top(points.iter().map(|point| point.1).chain([rent]));
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}: what the traffic would cost on the API", simulation.trace), ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..axis.length, 0.0..highest)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(axis.unit)
        .x_label_formatter(&short)
        .y_label_formatter(&short)
        .y_desc("USD an hour")
        .draw()?;
    chart
        .draw_series(AreaSeries::new(points, 0.0, COLOURS[0].mix(0.25)).border_style(COLOURS[0]))?
        .label("API bill")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], COLOURS[0].stroke_width(3)));
    chart
        .draw_series(LineSeries::new([(0.0, rent), (axis.length, rent)], COLOURS[3].stroke_width(2)))?
        .label(format!("break-even: rent of one replica, {rent:.2} USD an hour"))
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], COLOURS[3].stroke_width(3)));
    legend(&mut chart)?;
    Ok(())
}

fn replicas(simulation: &Simulation, area: &Area<'_>) -> Drawn {
    let axis = axis(simulation);
    let held = |outcome: &Outcome| -> Vec<(f64, f64)> {
        means(&axis, &outcome.slots.iter().map(|slot| f64::from(slot.ready)).collect::<Vec<_>>())
    };
    let lines: Vec<_> = simulation.outcomes.iter().map(held).collect();
    let highest = top(lines.iter().flatten().map(|point| point.1).chain([1.0]));
    let mut chart = ChartBuilder::on(area)
        .caption("Replicas that served", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..axis.length, 0.0..highest)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(axis.unit)
        .x_label_formatter(&short)
        .y_label_formatter(&short)
        .y_desc("replicas")
        .draw()?;
    for (index, (outcome, line)) in simulation.outcomes.iter().zip(lines).enumerate() {
        if outcome.starts == 0 {
            continue;
        }
        let colour = COLOURS[index % COLOURS.len()];
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
            .label(outcome.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
    }
    legend(&mut chart)?;
    Ok(())
}

fn cost(simulation: &Simulation, area: &Area<'_>) -> Drawn {
    let axis = axis(simulation);
    let lines: Vec<_> = simulation.outcomes.iter().map(|outcome| cumulative(&axis, outcome)).collect();
    let optimum = simulation.optimum.total.to_usd_f64();
    let highest = top(lines.iter().flatten().map(|point| point.1).chain([optimum]));
    let mut chart = ChartBuilder::on(area)
        .caption("Cumulative cost, API bill and rent", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..axis.length, 0.0..highest)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(axis.unit)
        .x_label_formatter(&short)
        .y_label_formatter(&short)
        .y_desc("USD")
        .draw()?;
    for (index, (outcome, line)) in simulation.outcomes.iter().zip(lines).enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
            .label(format!("{}: {:.2}", outcome.name, outcome.total()))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
    }
    let name = if simulation.optimum.exact { "optimum in hindsight" } else { "lower bound" };
    chart
        .draw_series(LineSeries::new([(0.0, optimum), (axis.length, optimum)], BLACK.stroke_width(1)))?
        .label(format!("{name}, whole time: {:.2}", simulation.optimum.total))
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLACK.stroke_width(1)));
    legend(&mut chart)?;
    Ok(())
}

/// What was spent up to the end of each group of slots.
fn cumulative(axis: &Axis, outcome: &Outcome) -> Vec<(f64, f64)> {
    let mut spent = NanoUsd::ZERO;
    let mut points = vec![(0.0, 0.0)];
    for (index, group) in outcome.slots.chunks(axis.group).enumerate() {
        spent += group.iter().map(|slot| slot.spent).sum();
        let end = count(index * axis.group + group.len()) * axis.slot;
        points.push((end, spent.to_usd_f64()));
    }
    points
}
