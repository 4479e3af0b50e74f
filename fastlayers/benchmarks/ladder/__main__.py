from fastlayers.benchmarks.ladder.ladder import main

main()
